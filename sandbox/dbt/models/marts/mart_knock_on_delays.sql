{% set late = var('on_time_minutes') %}
select
    carrier_code,
    count(*) as second_departures,
    {{ share_of('previous_arrival_delay_minutes >= ' ~ late) }} as after_late_arrival_share,
    {{ share_of('departure_delay_minutes >= ' ~ late) }} as late_departure_rate,
    round(cast(avg(case
        when previous_arrival_delay_minutes < {{ late }} then null
        when departure_delay_minutes >= {{ late }} then 1.0
        else 0.0
    end) as numeric(18, 8)), 4) as late_after_late_rate,
    round(cast(avg(case
        when previous_arrival_delay_minutes >= {{ late }} then null
        when departure_delay_minutes >= {{ late }} then 1.0
        else 0.0
    end) as numeric(18, 8)), 4) as late_after_punctual_rate
from {{ ref('int_aircraft_rotations') }}
where previous_arrival_delay_minutes is not null
group by carrier_code
