//! Requests over real connections, in any version of HTTP.

use std::net::{Ipv4Addr, SocketAddr};

use axum::{Router, serve::ListenerExt};
use bytes::Bytes;
use http::{Method, Request, Version};
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{TcpListener, TcpStream};

use super::{Answer, read};

/// The versions that clients speak to a proxy.
pub const VERSIONS: [Version; 3] = [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2];

/// Serves a router on a port of its own for HTTP/1.x and HTTP/2, until the runtime of the test ends.
pub async fn serve(router: Router) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // Without the delay of small segments, which costs a response over HTTP/2 40 ms.
    let listener = listener.tap_io(|stream| stream.set_nodelay(true).unwrap());
    tokio::spawn(axum::serve(listener, router).into_future());
    address
}

/// A request for `path` with these header fields and no content.
pub fn request(
    version: Version,
    method: &Method,
    path: &str,
    fields: &[(&str, &str)],
) -> Request<Full<Bytes>> {
    let mut request = Request::builder().version(version).method(method).uri(path);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Full::default()).unwrap()
}

/// Sends a request over a connection of its own, and reads the response to its end.
pub async fn exchange(address: SocketAddr, mut request: Request<Full<Bytes>>) -> Answer {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let io = TokioIo::new(stream);
    if request.version() == Version::HTTP_2 {
        let uri = format!("http://{address}{}", request.uri());
        *request.uri_mut() = uri.parse().unwrap();
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        read(sender.send_request(request).await.unwrap()).await
    } else {
        request.headers_mut().insert("host", address.to_string().parse().unwrap());
        let (mut sender, connection) = http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        read(sender.send_request(request).await.unwrap()).await
    }
}
