//! runc's log: `--log FILE`, `--log-format text|json`, `--debug`.
//!
//! containerd (go-runc's `getLastRuntimeError`) and Docker read the last line whose `level` is `error` out of the JSON
//! file, and decode its `time` strictly.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::{Global, LogFormat};
use crate::output;

/// Where log lines go, and in which form.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    file: Option<Arc<File>>,
    format: LogFormat,
    debug: bool,
}

impl Log {
    /// Opens the log that the command line asks for.
    pub(crate) fn open(global: &Global) -> anyhow::Result<Self> {
        let open = |path: &PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map(Arc::new).with_context(|| format!("cannot open log {}", path.display()))
        };
        let file = global.log.as_ref().map(open).transpose()?;
        Ok(Self { file, format: global.log_format, debug: global.debug })
    }

    /// Takes the log lines of this process from now on.
    pub(crate) fn install(&self) {
        let level = if self.debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
        // It is the first; there is no other.
        drop(tracing_subscriber::registry().with(self.clone().with_filter(level)).try_init());
    }

    /// Tells the error that ends this process: in the log, and to a person on stderr.
    pub(crate) fn fatal(&self, error: &anyhow::Error) {
        let message = format!("{error:#}");
        self.write("error", &message);
        if self.file.is_some() || std::io::stderr().is_terminal() {
            output::words(&message);
        }
    }

    fn write(&self, level: &str, message: &str) {
        let Some(mut file) = self.file.as_deref() else {
            // To a person's terminal an error goes without runc's trimmings, by `fatal`.
            if level != "error" || !std::io::stderr().is_terminal() {
                output::words(line(LogFormat::Text, level, message));
            }
            return;
        };
        // A log that cannot be written cannot be complained of in the log.
        drop(file.write_all((line(self.format, level, message) + "\n").as_bytes()));
    }
}

fn line(format: LogFormat, level: &str, message: &str) -> String {
    let time = OffsetDateTime::now_utc();
    // Whole seconds, as logrus writes them.
    let time = time.replace_nanosecond(0).unwrap_or(time).format(&Rfc3339).unwrap_or_default();
    match format {
        LogFormat::Json => {
            serde_json::json!({ "level": level, "msg": message, "time": time }).to_string()
        }
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={message:?}"),
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG | Level::TRACE => "debug",
        };
        self.write(level, &(text.message + &text.fields));
    }
}

/// An event's message, and its fields as ` name=value`.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            self.fields.extend([" ", field.name(), "=", &format!("{value:?}")]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LogFormat, line};

    #[test]
    fn a_json_line_is_what_go_runc_decodes() {
        let value: serde_json::Value =
            serde_json::from_str(&line(LogFormat::Json, "error", "no \"kernel\"\n")).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "no \"kernel\"\n");
        let time = value["time"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.len() == 20, "{time}");
    }
}
