//! What the shim says of itself.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use serde_json::Value;

use crate::error::Error;

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The type under which containerd knows the OCI runtime spec's features, whose value is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// For `-v`.
pub(crate) fn version() -> Vec<u8> {
    format!("{}:\n  Version:  {VERSION}\n", crate::NAME).into_bytes()
}

/// For `-info`: a `RuntimeInfo` message.
///
/// # Errors
///
/// When it cannot be encoded.
pub(crate) fn info(features: &Value) -> Result<Vec<u8>, Error> {
    let version = RuntimeVersion { version: VERSION.to_owned(), ..Default::default() };
    let features = Any {
        type_url: FEATURES.to_owned(),
        value: features.to_string().into_bytes(),
        ..Default::default()
    };
    let info = RuntimeInfo {
        name: "io.containerd.kata.v2".to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    };
    info.write_to_bytes().map_err(|source| Error::Message {
        action: "encode",
        what: "RuntimeInfo",
        source,
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::types::introspection::RuntimeInfo;

    #[test]
    fn the_features_are_there_for_containerd_to_read() {
        let features = serde_json::json!({"ociVersionMin": "1.0.0"});
        let info = super::info(&features).unwrap();
        let info = RuntimeInfo::parse_from_bytes(&info).unwrap();
        assert_eq!(info.features.value, features.to_string().as_bytes());
        assert_eq!(info.version.version, super::VERSION);
    }
}
