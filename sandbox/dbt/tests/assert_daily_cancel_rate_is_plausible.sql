{{ config(group='flight-ops') }}
-- A day on which nearly everything is cancelled is a broken load, not a storm. Days with few flights prove
-- nothing. Lower the variable max_daily_cancel_rate to see this test fail on purpose.
select
    flight_date,
    count(*) as scheduled_flights,
    {{ share_of('is_cancelled') }} as cancel_rate
from {{ ref('fct_flights') }}
group by flight_date
having count(*) >= 100 and {{ share_of('is_cancelled') }} > {{ var('max_daily_cancel_rate') }}
