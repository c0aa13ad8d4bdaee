//! What all the servers have in common: a process, its folder, its log and its ports.

use std::{
    fmt::Display,
    fs,
    hash::{BuildHasher, RandomState},
    net::{Ipv4Addr, TcpListener, UdpSocket},
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
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A server's folder, and its process while it runs.
pub(super) struct Server {
    process: Option<Child>,
    folder: TempDir,
}

impl Server {
    pub(super) fn new(prefix: &str) -> Self {
        let folder = tempfile::Builder::new().prefix(prefix).tempdir().unwrap();
        give_away(folder.path());
        Self { process: None, folder }
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A file that the server owns and that nobody else may read: servers reject keys that others may read.
    pub(super) fn write_file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        give_away(&path);
        path
    }

    /// Starts the program and waits until it is ready, or returns the log of one that ended instead.
    pub(super) fn launch(
        &mut self,
        command: &mut Command,
        mut is_ready: impl FnMut() -> bool,
    ) -> Result<(), String> {
        assert!(self.process.is_none(), "the server runs already");
        let log = fs::File::create(self.folder().join("log")).unwrap();
        let program = command.get_program().to_owned();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let process = command.spawn();
        let process = process.unwrap_or_else(|error| panic!("{program:?}: {error}: run tests/run"));
        self.process = Some(process);
        let mut ended = false;
        wait_for(&format!("{program:?} to start"), || {
            ended = self.process.as_mut().unwrap().try_wait().unwrap().is_some();
            ended || is_ready()
        });
        if !ended {
            return Ok(());
        }
        self.process = None;
        Err(fs::read_to_string(self.folder().join("log")).unwrap())
    }

    pub(super) fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Neither ended nor stopped in its tracks.
    pub(super) fn answers(&self) -> bool {
        self.process.as_ref().is_some_and(|process| {
            stat(process.id()).is_some_and(|stat| !["T", "t", "Z"].contains(&stat.state.as_str()))
        })
    }

    pub(super) fn process_id(&self) -> u32 {
        self.process.as_ref().expect("the server runs").id()
    }

    /// Sends a signal, unless the process has ended: its id may be another's by now.
    pub(super) fn signal(&self, signal: &str) {
        if let Some(process) = &self.process {
            send_signal(signal, process.id());
        }
    }

    /// Ends the process with a signal that lets it tidy up; false if it does not heed it in time.
    pub(super) fn end(&mut self, signal: &str, patience: Duration) -> bool {
        self.signal("CONT");
        self.signal(signal);
        let deadline = Instant::now() + patience;
        while let Some(process) = &mut self.process {
            if !matches!(process.try_wait(), Ok(None)) {
                self.process = None;
            } else if Instant::now() > deadline {
                return false;
            } else {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        true
    }

    pub(super) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(super) fn send_signal(signal: &str, process: u32) {
    let command = format!("kill -{signal} {process}");
    let _ = Command::new("sh").args(["-c", &command]).stderr(Stdio::null()).status();
}

/// How long a server may take to start or to stop.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The state of a process.
pub(super) struct Stat {
    pub(super) state: String,
    pub(super) parent: u32,
}

pub(super) fn stat(process: u32) -> Option<Stat> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // "pid (name) state ppid …"; the name may have spaces in it.
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    Some(Stat { state: fields.next()?.to_owned(), parent: fields.next()?.parse().ok()? })
}

pub(super) fn children_of(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let ids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
    ids.filter(|&id| stat(id).is_some_and(|stat| stat.parent == parent)).collect()
}

/// A port of the loopback address that stays the owner's while its server is down, too.
pub struct Port {
    number: u16,
    /// The UDP port of this number marks the TCP port as taken for all the test processes, and is let go
    /// even when one of them is killed.
    _claim: UdpSocket,
}

impl Port {
    /// A free port below those that the system gives to outgoing connections: it cannot be taken by one
    /// while its server starts again.
    pub fn claim() -> Self {
        for _ in 0..1000 {
            let number = 15_000 + (RandomState::new().hash_one(()) % 17_000) as u16;
            let Ok(_claim) = UdpSocket::bind((Ipv4Addr::LOCALHOST, number)) else { continue };
            if TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Self { number, _claim };
            }
        }
        panic!("no free port");
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}

/// Starts a server; again on other ports if somebody took one in the meantime.
pub(super) fn on_free_ports<T, E: Display>(start: impl Fn() -> Result<T, E>) -> T {
    for _ in 0..10 {
        match start() {
            Ok(server) => return server,
            Err(log) if log.to_string().contains("Address already in use") => {}
            Err(log) => panic!("the server ended: {log}"),
        }
    }
    panic!("ten ports were free and then taken");
}

/// PostgreSQL does not run as root; as root, all the servers run as `nobody`.
pub(super) fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new(program);
    if let Some((user, group)) = other_user() {
        command.uid(user).gid(group).current_dir("/");
    }
    command
}

fn give_away(path: &Path) {
    if let Some((user, group)) = other_user() {
        std::os::unix::fs::chown(path, Some(user), Some(group)).unwrap();
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
