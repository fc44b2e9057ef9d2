{#- Schemas are exactly staging, intermediate, marts, snapshots and seeds: dbt's default would prefix
    them with the target's schema. It does here only if the target has a schema of its own (ELT_SCHEMA),
    so that a branch builds into my_feature_marts and leaves marts alone. -#}
{% macro generate_schema_name(custom_schema_name, node) -%}
    {%- if not custom_schema_name -%}
        {{ target.schema | trim }}
    {%- elif target.schema == 'main' -%}
        {{ custom_schema_name | trim }}
    {%- else -%}
        {{ target.schema | trim }}_{{ custom_schema_name | trim }}
    {%- endif -%}
{%- endmacro %}
