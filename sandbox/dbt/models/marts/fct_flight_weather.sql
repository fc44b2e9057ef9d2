select
    flights.flight_id,
    flights.flight_date,
    flights.carrier_code,
    flights.origin_airport,
    flights.departure_delay_minutes,
    flights.arrival_delay_minutes,
    flights.is_cancelled,
    flights.outcome,
    weather.visibility_miles,
    weather.wind_gust_mph,
    weather.precipitation_inches,
    -- The stations miss an hour now and then, and their year ends a day early.
    coalesce(weather.condition, 'not observed') as condition
from {{ ref('fct_flights') }} as flights
left join {{ ref('fct_weather_hours') }} as weather
    on
        flights.origin_airport = weather.airport
        and flights.scheduled_hour_at = weather.observed_hour_at
