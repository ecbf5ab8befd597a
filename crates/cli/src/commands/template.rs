//! `template create`, `list` and `remove`.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Context, query};
use crate::args::{Format, Template};
use crate::output;

pub(super) fn run(context: &Context<'_>, command: &Template) -> anyhow::Result<()> {
    let config = context.config()?;
    match command {
        Template::Create => {
            let place = sandbox::template::create(&config, &Context::program())?;
            output::line(place.display());
        }
        Template::List { format: Format::Json } => {
            output::json(&sandbox::template::list(&config))?;
        }
        Template::List { format: Format::Table } => {
            let rows = sandbox::template::list(&config).into_iter().map(|template| {
                let used = template.used.map(OffsetDateTime::from);
                let used = used.and_then(|used| used.format(&Rfc3339).ok()).unwrap_or_default();
                [template.name, format!("{} MiB", template.size >> 20), used]
            });
            query::table(&["NAME", "SIZE", "USED"], rows);
        }
        Template::Remove { all, names } => {
            let all_names = sandbox::template::list(&config).into_iter().map(|it| it.name);
            let names = if *all { all_names.collect() } else { names.clone() };
            for name in names {
                sandbox::template::remove(&config, &name)?;
            }
        }
    }
    Ok(())
}
