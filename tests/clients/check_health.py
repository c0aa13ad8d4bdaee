"""Calls the health service with each key. Arguments: the address, the bytes that each call sends, and the keys; an
empty one is no key. Prints the number of each status."""

import sys

import grpc

address, size, *keys = sys.argv[1:]


def varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


# A field 15, which the service does not have and skips.
message = b"\x7a" + varint(int(size)) + b"x" * int(size)

with grpc.insecure_channel(address) as channel:
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    for key in keys:
        metadata = [("authorization", f"Bearer {key}")] if key else []
        try:
            check(message, metadata=metadata, timeout=20)
            print(0)
        except grpc.RpcError as error:
            print(error.code().value[0])
