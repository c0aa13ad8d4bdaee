//! As much of Redis' protocol as a test needs to look behind the back of the client that it tests.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Sends one command over a connection of its own.
pub(super) fn ask(socket: &Path, password: Option<&str>, words: &[&str]) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answers = BufReader::new(stream.try_clone()?);
    if let Some(password) = password {
        write(&mut stream, &["AUTH", password])?;
        read(&mut answers)?;
    }
    write(&mut stream, words)?;
    read(&mut answers)
}

fn write(stream: &mut UnixStream, words: &[&str]) -> io::Result<()> {
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request += &format!("${}\r\n{word}\r\n", word.len());
    }
    stream.write_all(request.as_bytes())
}

fn read(answers: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    answers.read_line(&mut line)?;
    let line = line.trim_end();
    let (kind, rest) = line.split_at_checked(1).ok_or(io::ErrorKind::UnexpectedEof)?;
    let count = || rest.parse::<usize>().ok();
    Ok(match kind {
        "$" => {
            let Some(length) = count() else { return Ok("(nil)".to_owned()) };
            let mut bytes = vec![0; length + 2];
            answers.read_exact(&mut bytes)?;
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        }
        "*" => {
            let Some(count) = count() else { return Ok("(nil)".to_owned()) };
            let items: io::Result<Vec<_>> = (0..count).map(|_| read(answers)).collect();
            items?.join("\n")
        }
        "-" => line.to_owned(),
        _ => rest.to_owned(),
    })
}
