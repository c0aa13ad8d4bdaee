DROP FUNCTION api_key_try;
DROP TABLE api_key_usage;
DROP TABLE api_key_usage_writers;
