with weather as (

    select
        airport,
        observed_on,
        {{ count_where("condition = 'severe'") }} as severe_hours,
        {{ count_where("condition = 'adverse'") }} as adverse_hours,
        min(visibility_miles) as lowest_visibility_miles,
        max(wind_gust_mph) as strongest_gust_mph,
        sum(precipitation_inches) as precipitation_inches
    from {{ ref('fct_weather_hours') }}
    group by airport, observed_on

),

flights as (

    select
        origin_airport,
        flight_date,
        count(*) as scheduled_flights,
        {{ count_where("condition in ('severe', 'adverse')") }} as flights_in_bad_weather,
        {{ mean_of('departure_delay_minutes') }} as mean_departure_delay_minutes,
        {{ share_of("outcome in ('late', 'cancelled')") }} as disrupted_rate
    from {{ ref('fct_flight_weather') }}
    group by origin_airport, flight_date

)

select
    flights.origin_airport,
    flights.flight_date,
    flights.scheduled_flights,
    flights.flights_in_bad_weather,
    flights.mean_departure_delay_minutes,
    flights.disrupted_rate,
    weather.severe_hours,
    weather.adverse_hours,
    weather.lowest_visibility_miles,
    weather.strongest_gust_mph,
    weather.precipitation_inches,
    case
        when weather.severe_hours >= 3 and flights.disrupted_rate >= 0.4 then 'red'
        when weather.severe_hours + weather.adverse_hours >= 3 and flights.disrupted_rate >= 0.25 then 'amber'
        else 'green'
    end as alert_level
from flights
inner join weather
    on
        flights.origin_airport = weather.airport
        and flights.flight_date = weather.observed_on
