{#- Counts as bigint everywhere; DuckDB makes a 128-bit number of the sum of integers. -#}
{% macro count_where(condition) -%}
    count(case when {{ condition }} then 1 end)
{%- endmacro %}

{#- The share of rows for which a boolean holds; rows where it is null do not count. -#}
{% macro share_of(condition, digits=4) -%}
    round(
        cast(avg(case when {{ condition }} then 1.0 when not ({{ condition }}) then 0.0 end) as numeric(18, 8)),
        {{ digits }}
    )
{%- endmacro %}

{% macro mean_of(expression, digits=2) -%}
    round(cast(avg({{ expression }}) as numeric(18, 8)), {{ digits }})
{%- endmacro %}
