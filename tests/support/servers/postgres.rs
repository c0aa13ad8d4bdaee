//! PostgreSQL.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use super::process::{
    PATIENCE, Port, Server, children_of, on_free_ports, send_signal, stat, unprivileged, wait_for,
};

/// PostgreSQL, with the superuser `app` and nobody asked for a password.
pub struct Postgres {
    server: Server,
    port: Port,
    settings: Vec<String>,
    /// The folder of the locales that were made for it alone.
    locales: Option<PathBuf>,
    /// What the clock of the server is off by, as libfaketime reads it.
    clock: Option<String>,
}

impl Postgres {
    /// A server on a Unix socket and a free port of the loopback address.
    pub fn start() -> Self {
        Self::with_settings(&[])
    }

    pub fn with_settings(settings: &[&str]) -> Self {
        Self::with_files(&[], settings)
    }

    /// A server whose clock is off by `offset`, for example `+10s`. Only its processes have that clock. The program's own
    /// clock can't be set in this way: it is read without the C library.
    pub fn with_clock(offset: &str) -> Self {
        Self::with(&[], &[], None, Some(offset))
    }

    /// A server whose messages are in German. `None` where the system lacks the sources of locales (Debian's package
    /// `locales`). It is for the caller to see whether the server has its translations.
    pub fn in_german() -> Option<Self> {
        let is_there = Path::new("/usr/share/i18n/locales/de_DE").exists();
        is_there.then(|| Self::with(&[], &["lc_messages=de_DE.UTF-8"], Some("de_DE"), None))
    }

    /// A server with settings whose values are files, given by name and content.
    pub fn with_files(files: &[(&str, &str)], settings: &[&str]) -> Self {
        Self::with(files, settings, None, None)
    }

    fn with(
        files: &[(&str, &str)],
        settings: &[&str],
        locale: Option<&str>,
        clock: Option<&str>,
    ) -> Self {
        on_free_ports(|| {
            let server = Server::new("tak-pg-");
            let mut initdb = unprivileged(&bin("initdb"));
            initdb
                .args(["-U", "app", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C", "-D"])
                .arg(server.folder().join("data"));
            assert!(initdb.stdout(Stdio::null()).status().unwrap().success(), "initdb failed");
            let settings = settings.iter().map(|&setting| setting.to_owned());
            let files = files
                .iter()
                .map(|(name, text)| format!("{name}={}", server.write_file(name, text).display()));
            let settings = settings.chain(files).collect();
            let clock = clock.map(str::to_owned);
            let locales = locale.map(|locale| define(locale, &server.folder().join("locales")));
            let mut postgres = Self { server, port: Port::claim(), settings, locales, clock };
            postgres.launch().map(|()| postgres)
        })
    }

    /// A standby that follows this server through `port`, its own or that of a proxy before it.
    pub fn standby(&self, port: u16) -> Self {
        on_free_ports(|| {
            let server = Server::new("tak-pg-");
            let mut copy = unprivileged(&bin("pg_basebackup"));
            copy.args(["-h", "127.0.0.1", "-U", "app", "-c", "fast", "-R", "--no-sync", "-p"]);
            copy.arg(port.to_string()).arg("-D").arg(server.folder().join("data"));
            assert!(copy.status().unwrap().success(), "pg_basebackup failed");
            let settings = self.settings.clone();
            let (locales, clock) = (self.locales.clone(), self.clock.clone());
            let mut postgres = Self { server, port: Port::claim(), settings, locales, clock };
            postgres.launch().map(|()| postgres)
        })
    }

    /// Runs one of PostgreSQL's programs at this server, with `input`, and returns what it prints.
    pub fn program(&self, name: &str, arguments: &[&str], input: &str) -> String {
        let mut command = unprivileged(&bin(name));
        command.arg("-h").arg(self.folder()).args(["-p", &self.port().to_string(), "-U", "app"]);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut to_process = process.stdin.take().unwrap();
        let input = input.to_owned();
        // On a thread of its own: the program may print before it has read everything.
        let writer = std::thread::spawn(move || drop(to_process.write_all(input.as_bytes())));
        let output = process.wait_with_output().unwrap();
        writer.join().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name} {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a script with psql, up to its first error, which fails the test.
    pub fn script(&self, database: &str, sql: &str) -> String {
        self.program("psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1", database], sql)
    }

    /// What the server has logged since it was last started.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder().join("log")).unwrap()).into_owned()
    }

    pub fn folder(&self) -> &Path {
        self.server.folder()
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Over the Unix socket.
    pub fn url(&self) -> String {
        self.database_url("postgres")
    }

    pub fn database_url(&self, database: &str) -> String {
        let host = self.folder().to_str().unwrap().replace('/', "%2F");
        format!("postgres://app@{host}:{}/{database}", self.port())
    }

    /// Over the loopback address.
    pub fn tcp_url(&self, parameters: &str) -> String {
        format!("postgres://app@127.0.0.1:{}/postgres?{parameters}", self.port())
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
        self.thaw();
        assert!(self.server.end("INT", PATIENCE), "PostgreSQL does not stop");
    }

    /// Ends every process of the server at once, as a power cut would. What was committed is still there.
    pub fn kill(&mut self) {
        if !self.server.is_running() {
            return;
        }
        // A parent that stands still has no further children while they are counted.
        self.server.signal("STOP");
        let children = children_of(self.server.process_id());
        for &child in &children {
            send_signal("KILL", child);
        }
        self.server.kill();
        // The data is in use for as long as one of them lives.
        let is_gone = |&child: &u32| stat(child).is_none_or(|stat| stat.state == "Z");
        wait_for("PostgreSQL to die", || children.iter().all(is_gone));
        self.forget_shared_memory();
    }

    /// The system keeps a segment of a killed server; its id is in the seventh line of the lock file.
    fn forget_shared_memory(&self) {
        let lock =
            fs::read_to_string(self.folder().join("data/postmaster.pid")).unwrap_or_default();
        let segment = lock.lines().nth(6).and_then(|ids| ids.split_whitespace().nth(1));
        if let Some(segment) = segment {
            let mut remove = Command::new("ipcrm");
            let _ = remove.args(["-m", segment]).stderr(Stdio::null()).status();
        }
    }

    pub fn start_again(&mut self) {
        self.launch().unwrap();
    }

    /// Copies the data, as a nightly backup would; the server is down meanwhile.
    pub fn save_copy(&mut self) {
        self.stop();
        self.copy_folder("data", "copy");
        self.start_again();
    }

    /// Brings back the data of the last copy and forgets what came after it.
    pub fn start_again_from_copy(&mut self) {
        self.stop();
        self.copy_folder("copy", "data");
        self.start_again();
    }

    fn copy_folder(&self, from: &str, to: &str) {
        let [from, to] = [from, to].map(|name| self.folder().join(name));
        let _ = fs::remove_dir_all(&to);
        let copied = unprivileged(Path::new("cp")).arg("-a").args([from, to]).status().unwrap();
        assert!(copied.success(), "cannot copy the data");
    }

    /// Stops every process of the server in its tracks: connections stay open, nothing answers.
    pub fn freeze(&self) {
        self.signal_all("STOP");
    }

    pub fn thaw(&self) {
        self.signal_all("CONT");
    }

    fn signal_all(&self, signal: &str) {
        if self.server.is_running() {
            self.server.signal(signal);
            for child in children_of(self.server.process_id()) {
                send_signal(signal, child);
            }
        }
    }

    fn launch(&mut self) -> Result<(), String> {
        let (folder, port) = (self.folder(), self.port().to_string());
        let mut ready = Command::new(bin("pg_isready"));
        ready.arg("-q").arg("-h").arg(folder).args(["-p", &port]);
        let mut command = unprivileged(&bin("postgres"));
        if let Some(locales) = &self.locales {
            command.env("LOCPATH", locales);
        }
        if let Some(offset) = &self.clock {
            command.env("LD_PRELOAD", libfaketime()).env("FAKETIME", offset);
            // Time-outs of the server use the monotonic clock.
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        command.arg("-D").arg(folder.join("data")).args(["-p", &port, "-k"]).arg(folder);
        let common = [
            "fsync=off",
            "shared_buffers=16MB",
            "listen_addresses=127.0.0.1",
            // In files of its own folder, which go away with it even when it is killed.
            "dynamic_shared_memory_type=mmap",
        ];
        for setting in common.into_iter().chain(self.settings.iter().map(String::as_str)) {
            command.args(["-c", setting]);
        }
        self.server.launch(&mut command, || ready.status().unwrap().success())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.thaw();
        // Not at once: it gives its shared memory back.
        if !self.server.end("QUIT", Duration::from_secs(5)) {
            self.kill();
        }
    }
}

/// Returns libfaketime for programs with threads, which `tests/run` installs.
fn libfaketime() -> PathBuf {
    let library = Path::new("faketime/libfaketimeMT.so.1");
    let folders = fs::read_dir("/usr/lib").unwrap().flatten();
    let mut libraries = folders.map(|folder| folder.path().join(library));
    libraries
        .find(|library| library.exists())
        .expect("libfaketime is missing: install the package libfaketime, as tests/run does")
}

/// Compiles a locale into a folder, which is returned.
fn define(locale: &str, folder: &Path) -> PathBuf {
    fs::create_dir(folder).unwrap();
    let mut define = Command::new("localedef");
    define.args(["-i", locale, "-f", "UTF-8"]).arg(folder.join(format!("{locale}.UTF-8")));
    assert!(define.status().unwrap().success(), "localedef failed");
    folder.to_owned()
}

/// Debian keeps the server's programs out of the path, in a folder for each version.
fn bin(program: &str) -> PathBuf {
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
