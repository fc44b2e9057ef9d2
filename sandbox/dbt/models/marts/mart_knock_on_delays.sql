{% set late = var('on_time_minutes') %}
{% set was_late = 'previous_arrival_delay_minutes >= ' ~ late %}
{% set leaves_late = 'departure_delay_minutes >= ' ~ late %}

with second_departures as (

    select
        carrier_code,
        {{ was_late }} as was_late,
        {{ leaves_late }} as leaves_late,
        case when {{ was_late }} then {{ leaves_late }} end as late_after_late,
        case when not ({{ was_late }}) then {{ leaves_late }} end as late_after_punctual
    from {{ ref('int_aircraft_rotations') }}
    where previous_arrival_delay_minutes is not null

)

select
    carrier_code,
    count(*) as second_departures,
    {{ share_of('was_late') }} as after_late_arrival_share,
    {{ share_of('leaves_late') }} as late_departure_rate,
    {{ share_of('late_after_late') }} as late_after_late_rate,
    {{ share_of('late_after_punctual') }} as late_after_punctual_rate
from second_departures
group by carrier_code
