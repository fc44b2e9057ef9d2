-- The PostgreSQL of the wheel comes without its contrib extensions. Prefect's migrations ask for one of them,
-- pg_trgm, for indexes that quicken the search of names by parts of them, and for nothing else.
-- This stand-in lets these indexes be built, empty: void_in does nothing and returns nothing, so that no row
-- has an entry. The class has no operators, so no query is ever planned on it; names are searched row by row,
-- which is no matter for a local server. Production runs on a real PostgreSQL, with the real extension.

CREATE FUNCTION gin_trgm_nothing(text, internal, internal) RETURNS internal
  AS 'void_in' LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE;

CREATE FUNCTION gin_trgm_nothing(text, internal, int2, internal, internal, internal, internal) RETURNS internal
  AS 'void_in' LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE;

CREATE FUNCTION gin_trgm_nothing(internal, int2, text, int4, internal, internal, internal, internal)
  RETURNS boolean AS 'void_in' LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE;

CREATE OPERATOR CLASS gin_trgm_ops FOR TYPE text USING gin AS
  FUNCTION 2 gin_trgm_nothing(text, internal, internal),
  FUNCTION 3 gin_trgm_nothing(text, internal, int2, internal, internal, internal, internal),
  FUNCTION 4 gin_trgm_nothing(internal, int2, text, int4, internal, internal, internal, internal),
  STORAGE int4;
