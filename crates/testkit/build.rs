//! Generates the messages of `proto/cri.proto`.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(&out)
        .input("proto/cri.proto")
        .include("proto")
        .customize(protobuf_codegen::Customize::default().gen_mod_rs(false))
        .run()?;
    // The generated file opens with inner attributes and inner docs, which `include!` refuses.
    let path = out.join("cri.rs");
    let text = fs::read_to_string(&path)?;
    let kept: Vec<_> =
        text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!")).collect();
    fs::write(&path, kept.join("\n"))?;
    Ok(())
}
