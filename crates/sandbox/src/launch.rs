//! What passes between `create` and the sandbox process that it starts: one socket, one JSON object a line each way.
//!
//! `create` sends a [`Launch`]; the sandbox process answers with [`Report`]s. To [`Report::Hooks`] `create` answers with a
//! [`HooksDone`]; [`Report::Ready`] or [`Report::Failed`] is the last. When `create` dies, the sandbox process reads the
//! end of the socket and gives up too.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Config;
use crate::error::ErrorKind;
use crate::state::Root;

/// Everything that a sandbox process needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub(crate) root: Root,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// `config.json`.
    pub(crate) spec: Value,
    /// Annotations already applied.
    pub(crate) config: Config,
    pub(crate) systemd_cgroup: bool,
    /// Whether the sandbox process's standard streams are one terminal in raw mode, for a process with a terminal.
    pub(crate) terminal: bool,
    /// The program that runs the `device` role, with its first arguments.
    pub(crate) device_program: (PathBuf, Vec<String>),
}

/// What the sandbox process reports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    /// Its namespaces are there: the hooks of the runtime's namespace may run.
    Hooks,
    /// The container is created.
    Ready,
    /// It is not, and nothing of it runs any more.
    Failed { text: String, kind: ErrorKind },
}

/// The hooks have run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HooksDone;
