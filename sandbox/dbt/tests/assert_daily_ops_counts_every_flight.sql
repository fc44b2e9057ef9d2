{{ config(group='flight-ops') }}
-- What the dashboard adds up to is what the fact table holds.
select daily.flights_in_mart, facts.flights_in_facts
from (select coalesce(sum(scheduled_flights), 0) as flights_in_mart from {{ ref('mart_daily_ops') }}) as daily
cross join (select count(*) as flights_in_facts from {{ ref('fct_flights') }}) as facts
where daily.flights_in_mart is distinct from facts.flights_in_facts
