DROP FUNCTION api_key_lease;
DROP TABLE api_key_leases;
