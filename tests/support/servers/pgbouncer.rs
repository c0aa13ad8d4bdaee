//! PgBouncer, a connection pooler in front of PostgreSQL.

use std::{net::TcpStream, path::Path, process::Command};

use super::{
    postgres::Postgres,
    process::{Port, Server, on_free_ports, unprivileged},
};

/// PgBouncer in transaction mode with one connection to the server, which all its clients take turns on.
pub struct PgBouncer {
    _server: Server,
    port: Port,
}

impl PgBouncer {
    /// A pooler on a free port of the loopback address, with further lines for the section `pgbouncer`.
    pub fn start(postgres: &Postgres, settings: &str) -> Self {
        on_free_ports(|| {
            let (mut server, port) = (Server::new("tak-pgb-"), Port::claim());
            let users = server.write_file("users", "\"app\" \"\"\n");
            // Since 1.21; before, statements stay prepared on the one server connection that there is.
            let prepared = if version() >= (1, 21) { "max_prepared_statements = 100" } else { "" };
            let config = format!(
                "[databases]\n* = host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {}\nunix_socket_dir =\nauth_type = trust\nauth_file = {}\n\
                 pool_mode = transaction\ndefault_pool_size = 1\n{prepared}\n{settings}\n",
                postgres.port(),
                port.number(),
                users.display(),
            );
            let mut command = unprivileged(program());
            command.arg(server.write_file("pgbouncer.ini", &config));
            let is_ready = || TcpStream::connect(("127.0.0.1", port.number())).is_ok();
            server.launch(&mut command, is_ready).map(|()| Self { _server: server, port })
        })
    }

    pub fn url(&self) -> String {
        format!("postgres://app@127.0.0.1:{}/postgres", self.port.number())
    }
}

fn version() -> (u32, u32) {
    let output = Command::new(program()).arg("--version").output().expect("run tests/run");
    let text = String::from_utf8(output.stdout).unwrap();
    let number = text.split_whitespace().nth(1).expect("PgBouncer 1.2.3");
    let mut parts = number.split('.').map(|part| part.parse().unwrap());
    (parts.next().unwrap(), parts.next().unwrap())
}

/// Debian keeps it where the path of a user need not lead.
fn program() -> &'static Path {
    let installed = Path::new("/usr/sbin/pgbouncer");
    if installed.exists() { installed } else { Path::new("pgbouncer") }
}
