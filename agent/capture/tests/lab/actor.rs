//! A Python interpreter somewhere in the box, told what to do line by line. What it opens stays open.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

const LOOP: &str = r#"
import sys, os, socket, struct, time, errno, subprocess, threading
socket.setdefaulttimeout(5)
names = globals()
for line in sys.stdin:
    code = bytes.fromhex(line.strip()).decode()
    try:
        try:
            answer = "ok " + str(eval(compile(code, "actor", "eval"), names))
        except SyntaxError:
            exec(compile(code, "actor", "exec"), names)
            answer = "ok "
    except Exception as error:
        name = errno.errorcode.get(getattr(error, "errno", None), "") or type(error).__name__
        answer = "no " + name + " " + str(error)
    print(answer.encode().hex(), flush=True)
"#;

/// The interpreter. Ends when it is dropped.
pub struct Actor {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Actor {
    pub fn start(place: impl FnOnce(Command) -> Command) -> Self {
        let mut command = Command::new("python3");
        command
            .args(["-u", "-c", LOOP])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = place(command).spawn().unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Evaluates an expression, or runs statements; `Err` has the errno's name, or the exception's, and its text.
    pub fn tell(&mut self, code: &str) -> Result<String, String> {
        self.begin(code);
        self.finish()
    }

    /// The same, where a failure is the test's.
    pub fn must(&mut self, code: &str) -> String {
        self.tell(code).unwrap_or_else(|error| panic!("{code}: {error}"))
    }

    /// Starts to do something; [`Self::finish`] waits for it.
    pub fn begin(&mut self, code: &str) {
        let hex: String = code.bytes().map(|byte| format!("{byte:02x}")).collect();
        writeln!(self.stdin, "{hex}").unwrap();
    }

    pub fn finish(&mut self) -> Result<String, String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        let line = line.trim();
        let bytes: Vec<u8> = (0..line.len() / 2)
            .map(|index| u8::from_str_radix(&line[index * 2..index * 2 + 2], 16).unwrap())
            .collect();
        let text = String::from_utf8(bytes).unwrap();
        match text.split_once(' ') {
            Some(("ok", answer)) => Ok(answer.to_owned()),
            Some((_, error)) => Err(error.to_owned()),
            None => panic!("the actor died"),
        }
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
