//! `pool fill`, `list` and `drain`.

use super::{Context, query};
use crate::args::{Format, Pool};
use crate::output;

pub(super) fn run(context: &Context<'_>, command: &Pool) -> anyhow::Result<()> {
    let config = context.config()?;
    match command {
        Pool::Fill => {
            let added = sandbox::pool::fill(&config, &Context::program())?;
            output::line(format_args!("{added} added"));
        }
        Pool::List { format: Format::Json } => output::json(&sandbox::pool::list(&config))?,
        Pool::List { format: Format::Table } => {
            let rows = sandbox::pool::list(&config).into_iter().map(|pooled| {
                let status = if pooled.ready { "ready" } else { "making" };
                [pooled.keeper.to_string(), status.to_owned(), pooled.shape]
            });
            query::table(&["PID", "STATUS", "SHAPE"], rows);
        }
        Pool::Drain => {
            let ended = sandbox::pool::drain(&config)?;
            output::line(format_args!("{ended} ended"));
        }
    }
    Ok(())
}
