select
    airlines.carrier_code,
    airlines.carrier_name,
    coalesce(alliances.alliance, 'none') as alliance,
    coalesce(alliances.business_model, 'unknown') as business_model
from {{ ref('stg_airlines') }} as airlines
left join {{ ref('airline_alliances') }} as alliances
    on airlines.carrier_code = alliances.carrier_code
