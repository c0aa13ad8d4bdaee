//! Private PostgreSQL and Redis servers: each in a temporary folder, on a socket or a free port of the
//! loopback address, not as root, ended by its process id when it goes out of scope.

use std::{
    fs,
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// Waits until `done` is true; polls, because servers do not say when they are ready.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A running server.
struct Server {
    process: Child,
    folder: TempDir,
}

impl Server {
    fn signal(&self, signal: &str) {
        send_signal(signal, self.process.id());
    }

    fn wait(&mut self, what: &str) {
        wait_for(what, || self.process.try_wait().unwrap().is_some());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal("CONT");
        self.signal("QUIT");
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn send_signal(signal: &str, process: u32) {
    let command = format!("kill -{signal} {process}");
    let _ = Command::new("sh").args(["-c", &command]).stderr(Stdio::null()).status();
}

/// PostgreSQL, with the superuser `app` and nobody asked for a password.
pub struct Postgres {
    server: Server,
    port: u16,
    settings: Vec<String>,
}

impl Postgres {
    /// A server on a Unix socket and a free port of the loopback address.
    pub fn start() -> Self {
        Self::with_settings(&[])
    }

    pub fn with_settings(settings: &[&str]) -> Self {
        Self::with_files(&[], settings)
    }

    /// A server with settings whose values are files, given by name and content.
    pub fn with_files(files: &[(&str, &str)], settings: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("tak-pg-").tempdir().unwrap();
        give_away(folder.path());
        let data = folder.path().join("data");
        let mut initdb = unprivileged(&postgres_bin("initdb"));
        initdb
            .args(["-U", "app", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C", "-D"])
            .arg(&data);
        assert!(initdb.stdout(Stdio::null()).status().unwrap().success(), "initdb failed");
        let port = free_port();
        let mut settings: Vec<_> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs::write(&path, content).unwrap();
            // The server reads no key that others may read.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            give_away(&path);
            settings.push(format!("{name}={}", path.display()));
        }
        let process = spawn_postgres(folder.path(), port, &settings);
        let server = Self { server: Server { process, folder }, port, settings };
        server.wait_until_ready();
        server
    }

    pub fn folder(&self) -> &Path {
        self.server.folder.path()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Over the Unix socket.
    pub fn url(&self) -> String {
        self.database_url("postgres")
    }

    pub fn database_url(&self, database: &str) -> String {
        let host = self.folder().to_str().unwrap().replace('/', "%2F");
        format!("postgres://app@{host}:{}/{database}", self.port)
    }

    /// Over the loopback address.
    pub fn tcp_url(&self, parameters: &str) -> String {
        format!("postgres://app@127.0.0.1:{}/postgres?{parameters}", self.port)
    }

    /// A plain connection, to play another service or an operator.
    pub async fn client(&self) -> tokio_postgres::Client {
        let (client, connection) =
            tokio_postgres::connect(&self.url(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Stops the server as an operator would, and leaves its data.
    pub fn stop(&mut self) {
        self.server.signal("INT");
        self.server.wait("PostgreSQL to stop");
    }

    pub fn start_again(&mut self) {
        self.server.process = spawn_postgres(self.folder(), self.port, &self.settings);
        self.wait_until_ready();
    }

    /// Stops every process of the server in its tracks: connections stay open, nothing answers.
    pub fn freeze(&self) {
        self.signal_all("STOP");
    }

    pub fn thaw(&self) {
        self.signal_all("CONT");
    }

    fn signal_all(&self, signal: &str) {
        let parent = self.server.process.id();
        send_signal(signal, parent);
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(stat) = fs::read_to_string(process.path().join("stat")) else { continue };
            // "pid (name) state ppid …"; the name may have spaces in it.
            let parent_of = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
            if parent_of == Some(parent.to_string().as_str()) {
                send_signal(signal, stat.split(' ').next().unwrap().parse().unwrap());
            }
        }
    }

    fn wait_until_ready(&self) {
        let mut ready = Command::new(postgres_bin("pg_isready"));
        ready.arg("-q").arg("-h").arg(self.folder()).args(["-p", &self.port.to_string()]);
        wait_for("PostgreSQL to start", || ready.status().unwrap().success());
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.thaw();
    }
}

fn spawn_postgres(folder: &Path, port: u16, settings: &[String]) -> Child {
    let log = fs::File::create(folder.join("log")).unwrap();
    let mut command = unprivileged(&postgres_bin("postgres"));
    command.arg("-D").arg(folder.join("data")).args(["-p", &port.to_string(), "-k"]).arg(folder);
    let common = ["fsync=off", "shared_buffers=16MB", "listen_addresses=127.0.0.1"];
    for setting in common.into_iter().chain(settings.iter().map(String::as_str)) {
        command.args(["-c", setting]);
    }
    command.stderr(log).stdout(Stdio::null()).spawn().unwrap()
}

/// Redis on a Unix socket, with nothing kept on disk.
pub struct Redis(Server);

impl Redis {
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("tak-redis-").tempdir().unwrap();
        give_away(folder.path());
        let socket = folder.path().join("socket");
        let mut command = unprivileged(Path::new("redis-server"));
        command.args(["--port", "0", "--save", "", "--unixsocket"]).arg(&socket);
        command.arg("--dir").arg(folder.path());
        let process = command.stdout(Stdio::null()).spawn().expect("redis-server: run tests/run");
        let server = Self(Server { process, folder });
        wait_for("Redis to start", || {
            std::os::unix::net::UnixStream::connect(server.socket()).is_ok()
        });
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.0.folder.path().join("socket")
    }

    pub fn freeze(&self) {
        self.0.signal("STOP");
    }

    pub fn thaw(&self) {
        self.0.signal("CONT");
    }

    pub fn process_id(&self) -> u32 {
        self.0.process.id()
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Debian keeps the server's programs out of the path, in a folder for each version.
fn postgres_bin(program: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<_> = versions
        .filter_map(|version| {
            let number = version.file_name().to_str()?.parse::<u32>().ok()?;
            let path = version.path().join("bin").join(program);
            path.exists().then_some((number, path))
        })
        .collect();
    found.sort();
    found.pop().map_or_else(|| program.into(), |(_, path)| path)
}

/// PostgreSQL refuses to run as root; as root, both servers run as `nobody`.
fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some((user, group)) = other_user() {
        command.uid(user).gid(group).current_dir("/");
    }
    command
}

fn give_away(folder: &Path) {
    if let Some((user, group)) = other_user() {
        std::os::unix::fs::chown(folder, Some(user), Some(group)).unwrap();
    }
}

/// The ids of `nobody`, if we are root.
fn other_user() -> Option<(u32, u32)> {
    if fs::metadata("/proc/self").ok()?.uid() != 0 {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let nobody = passwd.lines().find(|line| line.starts_with("nobody:")).expect("a user nobody");
    let mut ids = nobody.split(':').skip(2).map(|id| id.parse().unwrap());
    Some((ids.next().unwrap(), ids.next().unwrap()))
}
