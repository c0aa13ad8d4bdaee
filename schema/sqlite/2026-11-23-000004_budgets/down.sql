DROP TABLE api_key_leases;
