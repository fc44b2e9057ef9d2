{#- Which rows an increment takes: the interval that was asked for, else everything since the newest date
    that is already there, minus the days in which a late row may still arrive. A first build or a full
    refresh takes everything. -#}
{% macro increment_window(date_column) %}
    {%- set start = var('data_interval_start') -%}
    {%- set end = var('data_interval_end') -%}
    {%- if (start is none) != (end is none) -%}
        {{ exceptions.raise_compiler_error('Set both data_interval_start and data_interval_end, or neither.') }}
    {%- endif -%}
    {%- if not is_incremental() -%}
        true
    {%- elif start is not none -%}
        {{ date_column }} >= cast('{{ start }}' as date) and {{ date_column }} < cast('{{ end }}' as date)
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
