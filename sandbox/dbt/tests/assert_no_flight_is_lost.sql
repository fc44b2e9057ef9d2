{{ config(group='flight-ops') }}
-- Increments must not leave a staged flight behind. If one does (it arrived later than late_arrival_days),
-- rebuild with --full-refresh or name its dates with data_interval_start and data_interval_end.
select staged.flight_id
from {{ ref('stg_flights') }} as staged
left join {{ ref('fct_flights') }} as built
    on staged.flight_id = built.flight_id
where built.flight_id is null
