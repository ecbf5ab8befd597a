//! What can go wrong while an image is built or opened.

use std::io;
use std::path::PathBuf;

/// A failure to build, open or verify an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program that the build runs is not installed.
    #[error("cannot run {program}; install it (Debian: {package})")]
    Program {
        /// Its name.
        program: &'static str,
        /// Debian's package of it.
        package: &'static str,
        /// What execve(2) said.
        source: io::Error,
    },
    /// A program that the build runs failed.
    #[error("{program} could not {task}: {words}")]
    Failed {
        /// Its name.
        program: &'static str,
        /// A verb phrase.
        task: String,
        /// The end of what it wrote to its standard error.
        words: String,
    },
    /// The file is no kernel that a virtual machine could boot.
    #[error("{} is not a bootable x86-64 kernel: {reason}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The agent's file cannot be a guest's first process.
    #[error("{} cannot be the guest's first process: {reason}", path.display())]
    Agent {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No agent was named and none is where one is looked for.
    #[error("there is no kata-agent in {places}; build it, or name it with --agent")]
    NoAgent {
        /// The places, comma separated.
        places: String,
    },
    /// A module that every guest needs is not there.
    #[error(
        "the kernel module `{name}` is neither below {} nor in its modules.builtin; \
         without it a guest cannot work", directory.display()
    )]
    MissingModule {
        /// The module's name.
        name: String,
        /// The directory of modules.
        directory: PathBuf,
    },
    /// The file is no kernel module, or one of another kernel.
    #[error("{} is not a module of this kernel: {reason}", path.display())]
    Module {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The package holds no kernel.
    #[error("the package {} holds no {what}", path.display())]
    Package {
        /// The package file.
        path: PathBuf,
        /// What was looked for in it.
        what: &'static str,
    },
    /// There is no image in the directory.
    #[error("there is no guest image in {}; run `kata-runtime image build`", directory.display())]
    NotBuilt {
        /// The directory.
        directory: PathBuf,
    },
    /// The image in the directory is not what its manifest says.
    #[error("the guest image is damaged: {} {what}; run `kata-runtime image build` again", path.display())]
    Damaged {
        /// The file that is wrong.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A call on the host failed.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// A verb: `read`.
        action: &'static str,
        /// The object of the verb.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Adds the verb and the path that [`io::Error`] lacks.
pub(crate) fn host(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Host { action, path, source }
}
