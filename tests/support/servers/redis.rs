//! Redis, alone. A member of a cluster and a sentinel are the same program with other settings.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    process::{PATIENCE, Port, Server, on_free_ports, unprivileged},
    resp,
};

/// Redis on a Unix socket and a port of the loopback address, with nothing kept on disk unless the settings
/// say so.
pub struct Redis {
    server: Server,
    port: Port,
    /// Where the members of a cluster talk to each other.
    bus: Option<Port>,
    settings: Vec<String>,
}

impl Redis {
    pub fn start() -> Self {
        Self::with_settings(&[])
    }

    /// A server with settings `name=value`, such as `requirepass=secret` or `maxmemory=2mb`.
    pub fn with_settings(settings: &[&str]) -> Self {
        Self::with_files(&[], settings)
    }

    /// A server that speaks TLS on its port, given certificate, key and authority in PEM. A client needs no
    /// certificate; one that shows another authority's is rejected.
    pub fn with_tls(certificate: &str, key: &str, authority: &str) -> Self {
        let files = [
            ("tls-cert-file", certificate),
            ("tls-key-file", key),
            ("tls-ca-cert-file", authority),
        ];
        Self::with_files(&files, &["tls-auth-clients=optional"])
    }

    /// A server with settings whose values are files, given by name and content.
    pub fn with_files(files: &[(&str, &str)], settings: &[&str]) -> Self {
        on_free_ports(|| {
            let server = Server::new("tak-redis-");
            let settings = settings.iter().map(|&setting| setting.to_owned());
            let files = files
                .iter()
                .map(|(name, text)| format!("{name}={}", server.write_file(name, text).display()));
            let settings: Vec<_> = settings.chain(files).collect();
            let bus = settings.iter().any(|setting| setting == "cluster-enabled=yes");
            let bus = bus.then(Port::claim);
            let mut redis = Self { server, port: Port::claim(), bus, settings };
            redis.write_configuration();
            redis.launch().map(|()| redis)
        })
    }

    pub fn folder(&self) -> &Path {
        self.server.folder()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder().join("socket")
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    pub(super) fn bus_port(&self) -> u16 {
        self.bus.as_ref().expect("a member of a cluster").number()
    }

    /// Over the loopback address, with the password if there is one.
    pub fn url(&self) -> String {
        let scheme = if self.speaks_tls() { "rediss" } else { "redis" };
        let user = self.password().map(|password| format!(":{password}@")).unwrap_or_default();
        format!("{scheme}://{user}127.0.0.1:{}/", self.port())
    }

    pub fn process_id(&self) -> u32 {
        self.server.process_id()
    }

    pub fn is_running(&self) -> bool {
        self.server.is_running()
    }

    /// Whether it has been started and neither ended nor been frozen.
    pub fn answers(&self) -> bool {
        self.server.answers()
    }

    /// The answer to one command, behind the back of whatever is connected: text as it is, numbers in digits,
    /// the items of a list on a line each, `(nil)`, and errors with the `-` that they begin with.
    pub fn command(&self, words: &[&str]) -> String {
        self.try_command(words).unwrap()
    }

    pub fn try_command(&self, words: &[&str]) -> io::Result<String> {
        resp::ask(&self.socket(), self.password(), words)
    }

    /// How often the server has executed each command, by their names in small letters (`get`,
    /// `config|resetstat`), since it started or since `CONFIG RESETSTAT`.
    pub fn command_counts(&self) -> BTreeMap<String, u64> {
        let stats = self.command(&["INFO", "commandstats"]);
        let count = |line: &str| {
            let (name, counts) = line.trim_end().strip_prefix("cmdstat_")?.split_once(":calls=")?;
            Some((name.to_owned(), counts.split(',').next()?.parse().ok()?))
        };
        stats.lines().filter_map(count).collect()
    }

    /// Stops the server as an operator would.
    pub fn stop(&mut self) {
        assert!(self.server.end("TERM", PATIENCE), "Redis does not stop");
    }

    /// Ends the server at once, as a power cut would.
    pub fn kill(&mut self) {
        self.server.kill();
    }

    /// Starts on the same port, empty, unless the settings had it save its data.
    pub fn start_again(&mut self) {
        self.launch().unwrap();
    }

    /// Keeps a copy of all the data, aside: only [`Self::start_again_from_snapshot`] looks at it.
    pub fn save_snapshot(&self) {
        assert_eq!(self.command(&["SAVE"]), "OK");
        fs::rename(self.folder().join("dump.rdb"), self.folder().join("snapshot.rdb")).unwrap();
    }

    /// Brings back the data of the last snapshot and forgets what came after it, as a restored backup does.
    /// Not for a server with `appendonly=yes`, which reads no snapshots.
    pub fn start_again_from_snapshot(&mut self) {
        self.stop();
        let dump = self.folder().join("dump.rdb");
        let copied = ["snapshot.rdb", "dump.rdb"].map(|name| self.folder().join(name));
        let copied = unprivileged(Path::new("cp")).args(copied).status().unwrap();
        assert!(copied.success(), "no snapshot");
        self.start_again();
        fs::remove_file(dump).unwrap();
    }

    pub fn freeze(&self) {
        self.server.signal("STOP");
    }

    pub fn thaw(&self) {
        self.server.signal("CONT");
    }

    fn setting(&self, name: &str) -> Option<&str> {
        let mut settings = self.settings.iter().rev().filter_map(|line| line.split_once('='));
        settings.find_map(|(other, value)| (other == name).then_some(value))
    }

    fn password(&self) -> Option<&str> {
        self.setting("requirepass")
    }

    fn speaks_tls(&self) -> bool {
        self.setting("tls-cert-file").is_some()
    }

    /// Written once: a cluster's members and sentinels change the file while they run, and find it again.
    fn write_configuration(&self) {
        let port = if self.speaks_tls() { "tls-port" } else { "port" };
        let no_port = if self.speaks_tls() { "port=0" } else { "tls-port=0" };
        let folder = self.folder().display();
        let mut lines = vec![
            "bind=127.0.0.1".to_owned(),
            format!("{port}={}", self.port()),
            no_port.to_owned(),
            "save=".to_owned(),
            format!("dir={folder}"),
            format!("unixsocket={folder}/socket"),
        ];
        lines.extend(self.bus.as_ref().map(|bus| format!("cluster-port={}", bus.number())));
        let mut text = String::new();
        for line in lines.iter().chain(&self.settings) {
            let (name, value) = line.split_once('=').expect("a setting is name=value");
            text += &format!("{name} {}\n", if value.is_empty() { "\"\"" } else { value });
        }
        self.server.write_file("redis.conf", &text);
    }

    fn launch(&mut self) -> Result<(), String> {
        let mut command = unprivileged(Path::new("redis-server"));
        command.arg(self.folder().join("redis.conf"));
        if self.setting("sentinel").is_some() {
            command.arg("--sentinel");
        }
        let (socket, password) = (self.socket(), self.password().map(str::to_owned));
        // It listens before it has read its data.
        let is_ready = || {
            let answer = resp::ask(&socket, password.as_deref(), &["PING"]);
            answer.is_ok_and(|answer| !answer.starts_with("-LOADING"))
        };
        self.server.launch(&mut command, is_ready)
    }
}
