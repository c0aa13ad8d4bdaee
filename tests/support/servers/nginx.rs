//! nginx, a reverse proxy in front of the servers of a test.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
};

use http::Version;

use super::process::{
    PATIENCE, Port, Server, children_of, on_free_ports, send_signal, unprivileged,
};

/// nginx with one worker and one server block, which listens on one port for HTTP/1.x and on another for HTTP/2 without
/// TLS.
pub struct Nginx {
    server: Server,
    http_1: Port,
    http_2: Port,
}

impl Nginx {
    /// Starts nginx with further directives for the blocks `http` and `server`. Paths in them are relative to its
    /// folder.
    pub fn start(http: &str, server: &str) -> Self {
        Self::with_files(&[], http, server)
    }

    /// Starts nginx with files in its folder, given by name and content.
    pub fn with_files(files: &[(&str, &str)], http: &str, server: &str) -> Self {
        on_free_ports(|| {
            let mut nginx = Self {
                server: Server::new("tak-nginx-"),
                http_1: Port::claim(),
                http_2: Port::claim(),
            };
            for (name, content) in files {
                nginx.server.write_file(name, content);
            }
            nginx.server.write_file("nginx.conf", &nginx.configuration(http, server));
            nginx.launch().map(|()| nginx)
        })
    }

    /// The address that takes requests of a version of HTTP; HTTP/2 with prior knowledge.
    pub fn address(&self, version: Version) -> SocketAddr {
        let port = if version == Version::HTTP_2 { &self.http_2 } else { &self.http_1 };
        (Ipv4Addr::LOCALHOST, port.number()).into()
    }

    /// What nginx has logged, such as the reason of a 502.
    pub fn log(&self) -> String {
        fs::read_to_string(self.server.folder().join("log")).unwrap()
    }

    fn configuration(&self, http: &str, server: &str) -> String {
        format!(
            "daemon off;\nworker_processes 1;\npid pid;\nerror_log stderr warn;\n\
             events {{ worker_connections 512; }}\n\
             http {{\naccess_log off;\nclient_body_temp_path client_body;\nproxy_temp_path proxy;\n\
             fastcgi_temp_path fastcgi;\nuwsgi_temp_path uwsgi;\nscgi_temp_path scgi;\n{http}\n\
             server {{\nlisten {};\nlisten {} http2;\nroot .;\n{server}\n}}\n}}\n",
            self.address(Version::HTTP_11),
            self.address(Version::HTTP_2),
        )
    }

    fn launch(&mut self) -> Result<(), String> {
        let folder = self.server.folder();
        let mut command = unprivileged(program());
        // The log that is compiled in belongs to root.
        command.args(["-e", "stderr", "-c", "nginx.conf", "-p"]).arg(folder);
        let address = self.address(Version::HTTP_2);
        self.server.launch(&mut command, || TcpStream::connect(address).is_ok())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let workers = children_of(self.server.process_id());
        // Not at once: workers outlive a master that is killed.
        if !self.server.end("TERM", PATIENCE) {
            self.server.kill();
            workers.into_iter().for_each(|worker| send_signal("KILL", worker));
        }
    }
}

/// Debian keeps it where the path of a user need not lead.
fn program() -> &'static Path {
    let installed = Path::new("/usr/sbin/nginx");
    if installed.exists() { installed } else { Path::new("nginx") }
}
