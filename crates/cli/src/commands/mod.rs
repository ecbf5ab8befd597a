//! The commands: what was typed is turned into what the engine is asked, one file for each group of them.

mod do_command;
mod exec;
mod host;
mod lifecycle;
mod pool;
mod query;
mod resources;
mod run;
mod template;

use std::path::PathBuf;
use std::process::ExitCode;

use sandbox::{Config, ContainerId, Root};

use crate::args::{Cli, Command, Global};
use crate::output;

/// What every command needs of the flags before it.
struct Context<'a> {
    global: &'a Global,
}

impl Context<'_> {
    fn root(&self) -> anyhow::Result<Root> {
        let path = self.global.root.clone().unwrap_or_else(Root::default_path);
        Ok(Root::new(&path)?)
    }

    fn config(&self) -> anyhow::Result<Config> {
        Ok(match &self.global.config {
            Some(path) => Config::load_files([path])?,
            None => Config::load()?,
        })
    }

    /// This executable, however it was called and even where its file has been replaced since.
    fn program() -> PathBuf {
        "/proc/self/exe".into()
    }
}

/// Runs the command; the exit code is the container's where there is one.
pub(crate) fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let context = Context { global: &cli.global };
    if cli.version {
        query::version();
        return Ok(ExitCode::SUCCESS);
    }
    let Some(command) = &cli.command else {
        anyhow::bail!("no command given; see kata-runtime --help");
    };
    match command {
        Command::Create(args) => lifecycle::create(&context, args)?,
        Command::Start { id } => sandbox::start(&context.root()?, &ContainerId::new(id)?)?,
        Command::Run(args) => return run::run(&context, args),
        Command::State { id } => query::state(&context, id)?,
        Command::List(args) => query::list(&context, args)?,
        Command::Kill(args) => lifecycle::kill(&context, args)?,
        Command::Delete(args) => lifecycle::delete(&context, args)?,
        Command::Exec(args) => return exec::exec(&context, args),
        Command::Ps(args) => query::ps(&context, args)?,
        Command::Pause { id } => sandbox::pause(&context.root()?, &ContainerId::new(id)?)?,
        Command::Resume { id } => sandbox::resume(&context.root()?, &ContainerId::new(id)?)?,
        Command::Update(args) => resources::update(&context, args)?,
        Command::Events(args) => resources::events(&context, args)?,
        Command::Spec(args) => query::spec(args)?,
        Command::Features => output::json(&crate::runc_json::features())?,
        Command::Checkpoint(_) => anyhow::bail!("checkpoint is not supported yet"),
        Command::Restore(_) => anyhow::bail!("restore is not supported yet"),
        Command::Do(args) => return do_command::run(&context, args),
        Command::Check => return host::check(&context),
        Command::Env { json } => host::env(&context, *json)?,
        Command::Image(command) => host::image(&context, command)?,
        Command::Template(command) => template::run(&context, command)?,
        Command::Pool(command) => pool::run(&context, command)?,
    }
    Ok(ExitCode::SUCCESS)
}
