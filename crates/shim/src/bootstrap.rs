//! What containerd tells `start`, and the form in which it wants the answer.
//!
//! Up to 2.2 containerd writes the runtime's options to the standard input, if anything, takes a line with an address
//! for an answer, and understands it as task API version 2. From 2.3 on it writes `BootstrapParams` and wants a
//! `BootstrapResult` (containerd's `api/runtime/bootstrap/v1/bootstrap.proto`), each as the other: as a protobuf message
//! or as JSON.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use serde::{Deserialize, Serialize};

use crate::args::Args;
use crate::error::Error;

/// The newest task API that we serve.
const TASK_API: i32 = 3;

/// How the answer shall look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Line,
    Protobuf,
    Json,
}

/// What `start` was told on its standard input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Params {
    form: Form,
    /// Where containerd takes events, if it says so here.
    pub(crate) ttrpc_address: Option<String>,
    /// Where containerd takes gRPC, if it says so here.
    pub(crate) grpc_address: Option<String>,
    /// Where our socket shall be.
    pub(crate) socket_dir: Option<PathBuf>,
}

/// The JSON form of `BootstrapParams`; protobuf's JSON mapping takes either spelling of a name.
#[derive(Debug, Deserialize)]
struct JsonParams {
    #[serde(alias = "instance_id", alias = "instanceId")]
    instance: String,
    #[serde(default, alias = "containerd_ttrpc_address", alias = "containerdTtrpcAddress")]
    ttrpc_address: String,
    #[serde(default, alias = "containerd_grpc_address", alias = "containerdGrpcAddress")]
    grpc_address: String,
    #[serde(default, alias = "socketDir")]
    socket_dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct JsonResult<'a> {
    version: i32,
    address: &'a str,
    protocol: &'a str,
    metadata: HashMap<String, String>,
}

impl Params {
    /// Understands `input`.
    pub(crate) fn read(input: &[u8], args: &Args) -> Self {
        let some = |text: String| (!text.is_empty()).then_some(text);
        if let Ok(params) = serde_json::from_slice::<JsonParams>(input)
            && params.instance == args.id
        {
            return Self {
                form: Form::Json,
                ttrpc_address: some(params.ttrpc_address),
                grpc_address: some(params.grpc_address),
                socket_dir: params.socket_dir,
            };
        }
        // Options are an `Any`, whose first two fields are of the same types; but they do not say who we are.
        if let Ok(params) = BootstrapParams::parse_from_bytes(input)
            && params.instance_id == args.id
            && params.namespace == args.namespace
        {
            return Self {
                form: Form::Protobuf,
                ttrpc_address: some(params.containerd_ttrpc_address),
                grpc_address: some(params.containerd_grpc_address),
                socket_dir: params.socket_dir.and_then(some).map(PathBuf::from),
            };
        }
        Self { form: Form::Line, ttrpc_address: None, grpc_address: None, socket_dir: None }
    }

    /// The answer: where the shim listens.
    ///
    /// # Errors
    ///
    /// When it cannot be encoded.
    pub(crate) fn answer(&self, address: &str) -> Result<Vec<u8>, Error> {
        match self.form {
            Form::Line => Ok(address.as_bytes().to_vec()),
            Form::Protobuf => {
                let result = BootstrapResult {
                    version: TASK_API,
                    address: address.to_owned(),
                    protocol: "ttrpc".to_owned(),
                    ..Default::default()
                };
                result.write_to_bytes().map_err(|source| Error::Message {
                    action: "encode",
                    what: "BootstrapResult",
                    source,
                })
            }
            Form::Json => {
                let metadata = HashMap::new();
                let result = JsonResult { version: TASK_API, address, protocol: "ttrpc", metadata };
                serde_json::to_vec(&result)
                    .map_err(|source| Error::invalid(format!("BootstrapResult: {source}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Params;
    use crate::args::Args;
    use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    fn args() -> Args {
        Args::parse(["-namespace", "n", "-id", "c", "start"]).unwrap()
    }

    #[test]
    fn containerd_up_to_2_2_is_answered_with_a_line_whatever_options_it_gives() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![1, 2, 3],
            ..Default::default()
        };
        for input in [Vec::new(), options.write_to_bytes().unwrap(), b"\xff\xff".to_vec()] {
            let params = Params::read(&input, &args());
            assert_eq!(params.answer("unix:///s").unwrap(), b"unix:///s");
        }
    }

    #[test]
    fn a_protobuf_bootstrap_is_answered_by_protobuf() {
        let input = BootstrapParams {
            instance_id: "c".into(),
            namespace: "n".into(),
            containerd_ttrpc_address: "/t".into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        };
        let params = Params::read(&input.write_to_bytes().unwrap(), &args());
        assert_eq!(params.ttrpc_address.as_deref(), Some("/t"));
        assert_eq!(params.socket_dir.as_deref(), Some("/run/s".as_ref()));
        let answer = params.answer("unix:///s").unwrap();
        let answer = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((answer.version, answer.address.as_str()), (3, "unix:///s"));
        assert_eq!(answer.protocol, "ttrpc");
    }

    #[test]
    fn a_json_bootstrap_is_answered_by_json() {
        let input = br#"{"instanceId":"c","namespace":"n","containerdTtrpcAddress":"/t","logLevel":"LOG_LEVEL_INFO"}"#;
        let params = Params::read(input, &args());
        assert_eq!(params.ttrpc_address.as_deref(), Some("/t"));
        let answer: serde_json::Value =
            serde_json::from_slice(&params.answer("unix:///s").unwrap()).unwrap();
        assert_eq!(answer["address"], "unix:///s");
        assert_eq!(answer["version"], 3);
    }
}
