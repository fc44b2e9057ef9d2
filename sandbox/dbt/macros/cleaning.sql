{#- The CSV files write a missing value as NA. Loaders differ: some keep that text and leave every column
    as text, some detect types. Going through text makes staging indifferent to it. -#}
{% macro clean_text(column) -%}
    nullif(nullif(trim(cast({{ column }} as {{ dbt.type_string() }})), 'NA'), '')
{%- endmacro %}

{% macro clean_integer(column) -%}
    cast({{ clean_text(column) }} as {{ dbt.type_int() }})
{%- endmacro %}

{% macro clean_number(column) -%}
    cast({{ clean_text(column) }} as double precision)
{%- endmacro %}

{% macro clean_timestamp(column) -%}
    cast({{ clean_text(column) }} as timestamp with time zone)
{%- endmacro %}
