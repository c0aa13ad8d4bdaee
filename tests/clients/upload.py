"""Uploads to a server that denies them. Arguments: the client (http.client, urllib, requests), the URL, the key or
nothing, bytes, times. Prints the status of each response, and the one that its body names."""

import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request

client, url, key, size, times = sys.argv[1:]
headers = {"content-type": "application/octet-stream"}
if key:
    headers["x-api-key"] = key
body = b"x" * int(size)


def through_http_client():
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    connection.request("POST", parts.path, body, headers)
    response = connection.getresponse()
    return response.status, response.read()


def through_urllib():
    try:
        request = urllib.request.Request(url, body, headers, method="POST")
        response = urllib.request.urlopen(request, timeout=20)
    except urllib.error.HTTPError as error:
        response = error
    return response.status, response.read()


if client == "requests":
    import requests

    session = requests.Session()


def through_requests():
    response = session.post(url, data=body, headers=headers, timeout=20)
    return response.status_code, response.content


send = {"http.client": through_http_client, "urllib": through_urllib, "requests": through_requests}[client]
for _ in range(int(times)):
    try:
        status, text = send()
        print(status, json.loads(text)["status"])
    except Exception as error:
        print("failed:", type(error).__name__, error)
