{#- Which rows a build takes: the data interval that was asked for, else everything since the newest date that
    is already there, minus the days in which a late row may still arrive. Without an interval, a first build
    or a full refresh takes everything.

    A day that the interval touches is taken whole: whatever time of day it begins and ends at, intervals in a
    row leave no row out, and the unique key sees to it that none is there twice. -#}
{% macro increment_window(date_column) %}
    {%- set start = var('data_interval_start') -%}
    {%- set end = var('data_interval_end') -%}
    {%- if (start is none) != (end is none) -%}
        {{ exceptions.raise_compiler_error('Set both data_interval_start and data_interval_end, or neither.') }}
    {%- endif -%}
    {%- if start is not none -%}
        {#- ISO 8601 begins with the date, in the time zone of the schedule. -#}
        {%- set at_midnight = end[11:] == '' or end[11:].startswith('00:00:00') -%}
        {{ date_column }} >= cast('{{ start[:10] }}' as date)
        and {{ date_column }} {{ '<' if at_midnight else '<=' }} cast('{{ end[:10] }}' as date)
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
