//! Clients over loopback HTTP, each from an address of its own.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpSocket;

pub(crate) type Client = SendRequest<Empty<Bytes>>;

/// A connection from an address of the loopback network.
pub(crate) async fn connect(server: SocketAddr, from: Ipv4Addr) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((from, 0).into()).unwrap();
    let stream = socket.connect(server).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (client, connection) = handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The status that a request with this key is answered with.
pub(crate) async fn ask(client: &mut Client, path: &str, key: &str) -> StatusCode {
    let request = Request::get(path).header("host", "localhost").header("x-api-key", key);
    client.ready().await.unwrap();
    let response = client.send_request(request.body(Empty::new()).unwrap()).await.unwrap();
    let status = response.status();
    response.into_body().collect().await.unwrap();
    status
}
