//! The command line, as types. The OCI commands and their flags are runc's (its `man/*.8.md`); what we take and ignore
//! says so.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs each OCI container in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(
    name = "kata-runtime",
    version,
    about,
    disable_version_flag = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    /// Print the version.
    #[arg(short = 'v', long)]
    pub(crate) version: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// The flags before the command; see runc(8).
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Directory of the runtime's state [default: /run/kata-containers].
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// File that log lines go to [default: stderr].
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Form of log lines.
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Log more.
    #[arg(long)]
    pub(crate) debug: bool,
    /// The spec's cgroupsPath is systemd's, "slice:prefix:name".
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
    /// Read this configuration file and no other.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Taken and ignored: a caller of runc may pass it.
    #[arg(long, hide = true)]
    pub(crate) rootless: Option<String>,
    /// Taken and ignored: a caller of runc may pass it.
    #[arg(long, hide = true)]
    pub(crate) criu: Option<String>,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// `time="…" level=error msg="…"`
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a container; see runc-create(8).
    Create(Create),
    /// Run the program of a created container.
    Start { id: String },
    /// Create a container, start it, wait for it and delete it; see runc-run(8).
    Run(Run),
    /// Print a container's state.
    State { id: String },
    /// List containers.
    List(List),
    /// Send a signal to a container's init process; see runc-kill(8).
    Kill(Kill),
    /// Delete a container; see runc-delete(8).
    Delete(Delete),
    /// Run one more process in a container; see runc-exec(8).
    Exec(Box<Exec>),
    /// List a container's processes; see runc-ps(8).
    Ps(Ps),
    /// Freeze a container.
    Pause { id: String },
    /// Thaw a container.
    Resume { id: String },
    /// Change a container's limits; see runc-update(8).
    Update(Box<Update>),
    /// Print a container's figures; see runc-events(8).
    Events(Events),
    /// Write a config.json to start from; see runc-spec(8).
    Spec(SpecFile),
    /// Print what this runtime can do, as JSON.
    Features,
    /// Not supported yet: save a container.
    Checkpoint(Snapshot),
    /// Not supported yet: bring back a saved container.
    Restore(Snapshot),
    /// Run a command in a fresh VM, on a throw-away copy of this host's files.
    Do(Do),
    /// Say whether this host can run VMs, and what to do where it cannot.
    Check,
    /// Print the runtime's parts and their versions.
    Env {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The guest's kernel and initial file system.
    #[command(subcommand)]
    Image(Image),
    /// Machines that have booted, of which sandboxes are copies.
    #[command(subcommand)]
    Template(Template),
    /// Machines that wait for containers (`[pool]` in the configuration).
    #[command(subcommand)]
    Pool(Pool),
}

/// How a container is created; shared by `create` and `run`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The container's id.
    pub(crate) id: String,
    /// The bundle's directory.
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    pub(crate) bundle: PathBuf,
    /// Unix socket that gets the master of the container's terminal.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File that gets the pid of the process that stands for the container.
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Taken and ignored: the guest's root is its own.
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Taken and ignored: the guest's keyrings are its own.
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// Host file descriptors to pass on: only 0 is possible.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) create: Create,
    /// Return once it runs.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Do not delete it when it has exited.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Taken and ignored: the runtime is never a subreaper.
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// `table` or `json`.
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Print ids only.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// The form of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Send it to every process of the container.
    #[arg(short, long)]
    pub(crate) all: bool,
    /// The container.
    pub(crate) id: String,
    /// A signal by name or number.
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    pub(crate) signal: String,
}

#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kill it before where it runs; succeed where it does not exist.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// The containers.
    #[arg(required = true)]
    pub(crate) ids: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Unix socket that gets the master of the process's terminal.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console_socket: Option<PathBuf>,
    /// File that gets the pid of the process that stands for it.
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// File with the OCI spec's `process` object.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) process: Option<PathBuf>,
    /// Return once it runs.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Working directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// Environment variable, NAME=VALUE.
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// UID, or UID:GID.
    #[arg(short, long, value_name = "UID[:GID]")]
    pub(crate) user: Option<String>,
    /// Additional group.
    #[arg(short = 'g', long, value_name = "GID")]
    pub(crate) additional_gids: Vec<u32>,
    /// Capability to add.
    #[arg(short, long, value_name = "CAP")]
    pub(crate) cap: Vec<String>,
    /// Let it gain no privileges.
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// Taken and ignored: the guest has no SELinux.
    #[arg(long, hide = true)]
    pub(crate) process_label: Option<String>,
    /// Taken and ignored: the guest has no AppArmor.
    #[arg(long, hide = true)]
    pub(crate) apparmor: Option<String>,
    /// Host file descriptors to pass on: only 0 is possible.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) preserve_fds: u32,
    /// The container.
    pub(crate) id: String,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// `table`: the guest's processes; `json`: the host's pids that stand for them.
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// The container.
    pub(crate) id: String,
    /// Options of ps(1): taken and ignored.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Update {
    /// File with the OCI spec's `linux.resources`; `-`: stdin. The other flags then do not count.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// CPU period, in microseconds.
    #[arg(long)]
    pub(crate) cpu_period: Option<u64>,
    /// CPU time in every period, in microseconds.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// Relative share of CPU time.
    #[arg(long)]
    pub(crate) cpu_share: Option<u64>,
    /// CPUs of the host to run on.
    #[arg(long)]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes of the host to use.
    #[arg(long)]
    pub(crate) cpuset_mems: Option<String>,
    /// Most memory, in bytes or with a suffix as 64M; -1: no limit.
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory: Option<i64>,
    /// Memory that is reclaimed last, in bytes.
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory_reservation: Option<i64>,
    /// Most memory and swap together, in bytes.
    #[arg(long, allow_hyphen_values = true, value_parser = bytes)]
    pub(crate) memory_swap: Option<i64>,
    /// Most processes; -1: no limit.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Relative share of block I/O, 10 to 1000.
    #[arg(long)]
    pub(crate) blkio_weight: Option<u16>,
    /// The container.
    pub(crate) id: String,
}

/// Bytes as go-units' `RAMInBytes`, which runc uses, takes them: `64M`, `1.5g`, `512 KiB`, `100`, `-1`.
fn bytes(text: &str) -> Result<i64, String> {
    let refused = || format!("{text:?} is not a size like 67108864 or 64M");
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
    let unit = text[number.len()..].trim().to_ascii_lowercase();
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(refused()),
    };
    if let Ok(whole) = number.parse::<i64>() {
        return whole.checked_mul(1 << shift).ok_or_else(refused);
    }
    let (whole, fraction) = number.split_once('.').ok_or_else(refused)?;
    let digits = u32::try_from(fraction.len()).ok().filter(|&digits| digits <= 9);
    let tenth = digits.map(|digits| 10_i64.pow(digits)).ok_or_else(refused)?;
    let [whole, fraction] = [whole, fraction].map(|part| part.parse::<u32>().map(i64::from));
    let (whole, fraction) = (whole.map_err(|_| refused())?, fraction.map_err(|_| refused())?);
    let scaled = whole.checked_mul(1 << shift).ok_or_else(refused)?;
    scaled
        .checked_add((fraction << shift.min(30)) / tenth * (1 << (shift - shift.min(30))))
        .ok_or_else(refused)
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Print the figures once.
    #[arg(long)]
    pub(crate) stats: bool,
    /// Time between figures, as 5s or 500ms.
    #[arg(long, default_value = "5s")]
    pub(crate) interval: String,
    /// The container.
    pub(crate) id: String,
}

#[derive(Debug, Args)]
pub(crate) struct SpecFile {
    /// The bundle's directory.
    #[arg(short, long, default_value = ".", value_name = "DIR")]
    pub(crate) bundle: PathBuf,
    /// For a user who is not root.
    #[arg(long)]
    pub(crate) rootless: bool,
}

/// `checkpoint` and `restore`: whatever is asked, the answer is the same.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// Flags and the container.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Do {
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Build the guest's image from Debian's kernel package and the agent.
    Build(ImageBuild),
    /// Compare an image's files with its manifest.
    Verify {
        /// The image's directory [default: as configured].
        #[arg(long, value_name = "DIR")]
        path: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Make the template for containers without limits now, rather than at the first start.
    Create,
    /// List templates.
    List {
        /// `table` or `json`.
        #[arg(short, long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Remove templates; running containers do not need them.
    Remove {
        /// All of them.
        #[arg(short, long)]
        all: bool,
        /// Their names.
        #[arg(required_unless_present = "all")]
        names: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Pool {
    /// Fill it now and wait until it is full, rather than after the next start.
    Fill,
    /// List its machines.
    List {
        /// `table` or `json`.
        #[arg(short, long, value_enum, default_value = "table")]
        format: Format,
    },
    /// End its machines.
    Drain,
}

#[derive(Debug, Args)]
pub(crate) struct ImageBuild {
    /// The static kata-agent [default: beside this program].
    #[arg(long, value_name = "FILE")]
    pub(crate) agent: Option<PathBuf>,
    /// Where to put it [default: as configured].
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// A kernel instead of Debian's.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The modules of that kernel (a directory with modules.dep); none where all drivers are built in.
    #[arg(long, value_name = "DIR")]
    pub(crate) modules: Option<PathBuf>,
    /// A kernel package file instead of Debian's newest.
    #[arg(long, value_name = "DEB", conflicts_with = "kernel")]
    pub(crate) kernel_package: Option<PathBuf>,
    /// Directories whose files are put over the guest's initial file system.
    #[arg(long, value_name = "DIR")]
    pub(crate) rootfs_overlay: Vec<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::{Cli, bytes};
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_runc_reads_them() {
        for (text, expected) in [
            ("100", 100),
            ("-1", -1),
            ("64M", 64 << 20),
            ("64mb", 64 << 20),
            ("512 KiB", 512 << 10),
            ("1.5g", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for bad in ["", "M", "64X", "1.2.3", "9999999999T", "1,5g"] {
            assert!(bytes(bad).is_err(), "{bad:?}");
        }
    }
}
