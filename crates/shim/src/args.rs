//! The command line that containerd starts a shim with: flags as Go's `flag` package reads them.

use std::path::PathBuf;

use crate::error::Error;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Print the version.
    Version,
    /// Describe the runtime, as a `RuntimeInfo` message.
    Info,
    /// Start a shim, or name the one that runs already, and print where it listens.
    Start,
    /// Clean up after a shim that has died, and print how its task ended.
    Delete,
    /// Be the shim, on the listening socket that was inherited under this number. Ours, not containerd's.
    Serve(i32),
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) action: Action,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The container's id.
    pub(crate) id: String,
    /// Where containerd listens for gRPC.
    pub(crate) address: String,
    /// Where containerd takes events by ttrpc; what its environment says where it is empty. Ours, not containerd's.
    pub(crate) events: String,
    /// The bundle; the working directory where it is not told.
    pub(crate) bundle: PathBuf,
    pub(crate) debug: bool,
}

impl Args {
    /// Parses the words after the program's name.
    ///
    /// # Errors
    ///
    /// On a flag that containerd does not have, or one without its value.
    pub(crate) fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self, Error> {
        let mut args = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            events: String::new(),
            bundle: PathBuf::new(),
            debug: false,
        };
        let mut action = None;
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix('-') else {
                action = Some(match word {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    _ => return Err(Error::usage(format!("no such action {word:?}"))),
                });
                break;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, attached) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, None),
            };
            match name {
                "v" | "version" => return Ok(Self { action: Action::Version, ..args }),
                "info" => action = Some(Action::Info),
                "debug" => args.debug = attached != Some("false"),
                "namespace" | "id" | "address" | "events" | "bundle" | "serve"
                | "publish-binary" | "socket" => {
                    let value = attached.or_else(|| words.next());
                    let value = value
                        .ok_or_else(|| Error::usage(format!("flag -{name} needs an argument")))?;
                    action = args.set(name, value)?.or(action);
                }
                _ => return Err(Error::usage(format!("flag provided but not defined: -{name}"))),
            }
        }
        args.action = action.ok_or_else(|| Error::usage("name an action: start or delete"))?;
        if args.action != Action::Info {
            args.check()?;
        }
        Ok(args)
    }

    /// Takes a flag's value; an action, where the flag is one.
    fn set(&mut self, name: &str, value: &str) -> Result<Option<Action>, Error> {
        match name {
            "namespace" => value.clone_into(&mut self.namespace),
            "id" => value.clone_into(&mut self.id),
            "address" => value.clone_into(&mut self.address),
            "events" => value.clone_into(&mut self.events),
            "bundle" => self.bundle = value.into(),
            "serve" => {
                let number = value.parse();
                let wrong = |_| Error::usage(format!("-serve {value}: not a number"));
                return number.map(Action::Serve).map(Some).map_err(wrong);
            }
            // `publish-binary` speaks ttrpc with us instead, `socket` is containerd's guess of our socket.
            _ => {}
        }
        Ok(None)
    }

    fn check(&self) -> Result<(), Error> {
        if self.namespace.is_empty() {
            return Err(Error::usage("-namespace is missing"));
        }
        sandbox::ContainerId::new(&self.namespace)?;
        sandbox::ContainerId::new(&self.id)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Args};

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split_whitespace()).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_read_as_go_reads_them() {
        let args = parse(
            "-namespace k8s.io -id=c1 --address /run/c.sock -publish-binary /usr/bin/containerd -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(args.namespace, "k8s.io");
        assert_eq!(args.id, "c1");
        assert_eq!(args.address, "/run/c.sock");
        assert!(args.debug);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-namespace n -id c -serve 5").unwrap().action, Action::Serve(5));
    }

    #[test]
    fn a_bad_line_is_refused_by_what_is_bad() {
        for (line, words) in [
            ("", "name an action"),
            ("-namespace", "needs an argument"),
            ("-id x start", "-namespace is missing"),
            ("-namespace n start", "invalid container ID"),
            ("-namespace ../n -id x start", "invalid container ID"),
            ("-namespace n -id a/b delete", "invalid container ID"),
            ("-pprof start", "not defined: -pprof"),
            ("-namespace n -id x stop", "no such action"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(words), "{line}: {error}");
        }
    }
}
