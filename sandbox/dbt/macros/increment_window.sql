{#- Which rows a build takes: the data interval that was asked for, else everything since the newest date that
    is already there, minus the days in which a late row may still arrive. Without an interval, a first build
    or a full refresh takes everything.

    A day belongs to the interval in which it ends, and is taken whole: whatever time of day they are cut at,
    intervals in a row take each day once, so that two may be built at the same time. If both took a day, each
    would insert its rows, neither seeing those of the other, and the unique key would keep nobody from it.
    In an interval that begins and ends on one day no day ends: it builds nothing, and dbt warns. -#}
{% macro increment_window(date_column) %}
    {%- set start = var('data_interval_start') -%}
    {%- set end = var('data_interval_end') -%}
    {%- if (start is none) != (end is none) -%}
        {{ exceptions.raise_compiler_error('Set both data_interval_start and data_interval_end, or neither.') }}
    {%- endif -%}
    {%- if start is not none -%}
        {%- if execute and start[:10] == end[:10] -%}
            {%- do exceptions.warn(
                'Nothing is built of ' ~ this ~ ': its rows are of whole days, and the data interval from '
                ~ start ~ ' to ' ~ end ~ ' begins and ends on one day. Take intervals of whole days.'
            ) -%}
        {%- endif -%}
        {#- ISO 8601 begins with the date, in the time zone of the schedule. -#}
        {{ date_column }} >= cast('{{ start[:10] }}' as date)
        and {{ date_column }} < cast('{{ end[:10] }}' as date)
    {%- elif not is_incremental() -%}
        true
    {%- else -%}
        {{ date_column }} >= (
            select coalesce(
                {{ dbt.dateadd('day', -(var('late_arrival_days') | int), 'max(' ~ date_column ~ ')') }},
                cast('1900-01-01' as date)
            )
            from {{ this }}
        )
    {%- endif -%}
{% endmacro %}
