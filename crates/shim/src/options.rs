//! The runtime's options that containerd passes on: which configuration file to read.

use containerd_shim_protos::protobuf::rt::WireType;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Error as CodecError};
use sandbox::Config;

use crate::error::Error;

/// The message of containerd's `api/types/runtimeoptions/v1/api.proto`, under both of its names.
const OPTIONS: [&str; 2] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"];

/// The field `config_path` of that message.
const CONFIG_PATH: u32 = 2;

/// The configuration that `options` names; the installed one where they name none.
///
/// # Errors
///
/// When the options cannot be understood, or the file cannot.
pub(crate) fn config(options: Option<&Any>) -> Result<Config, Error> {
    let path = match options {
        Some(options) if is_ours(options) => config_path(&options.value).map_err(|source| {
            Error::Message { action: "decode", what: "runtimeoptions.v1.Options", source }
        })?,
        // Options of another runtime: containerd's clients pass runc's where they know no better.
        _ => None,
    };
    Ok(match path {
        Some(path) => Config::load_files([&path])?,
        None => Config::load()?,
    })
}

fn is_ours(options: &Any) -> bool {
    OPTIONS.iter().any(|name| options.type_url.ends_with(name))
}

fn config_path(message: &[u8]) -> Result<Option<String>, CodecError> {
    let mut stream = CodedInputStream::from_bytes(message);
    let mut path = None;
    while let Some(tag) = stream.read_raw_tag_or_eof()? {
        let (field, wire) = (tag >> 3, tag & 7);
        if field == CONFIG_PATH && wire == WireType::LengthDelimited as u32 {
            path = Some(stream.read_string()?).filter(|path| !path.is_empty());
        } else if let Some(wire) = WireType::new(wire) {
            stream.skip_field(wire)?;
        } else {
            break;
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::{config, config_path};
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    #[test]
    fn the_path_of_the_configuration_is_found_among_other_fields() {
        assert_eq!(config_path(b"").unwrap(), None);
        assert_eq!(config_path(b"\x0a\x01t\x12\x02/c\x1a\x01x").unwrap().as_deref(), Some("/c"));
        assert!(config_path(b"\x12\xff").is_err());
    }

    #[test]
    fn a_configuration_that_is_named_must_be_there() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x12\x0a/no/such/c".to_vec(),
            ..Default::default()
        };
        let error = config(Some(&options)).unwrap_err();
        assert!(sandbox::Chain(&error).to_string().contains("/no/such/c"));
    }
}
