"""Calls the health service with each key. Arguments: the address, and the keys; an empty one is no key. Prints the
number of each status."""

import sys

import grpc

address, *keys = sys.argv[1:]
with grpc.insecure_channel(address) as channel:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    for key in keys:
        metadata = [("authorization", f"Bearer {key}")] if key else []
        try:
            check(b"", metadata=metadata, timeout=20)
            print(0)
        except grpc.RpcError as error:
            print(error.code().value[0])
