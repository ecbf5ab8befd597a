//! What an image is made of, so that it can be told whether it still is that.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::kernel::KernelFormat;
use crate::package::Package;

/// The version of the manifest's form.
pub(crate) const VERSION: u32 = 1;

/// The list of an image's parts. Nothing in it depends on when or where the image was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this form.
    pub version: u32,
    /// What `uname -r` says in the guest.
    pub kernel_release: String,
    /// How the kernel is entered.
    pub kernel_format: KernelFormat,
    /// The kernel.
    pub kernel: Part,
    /// The initial file system.
    pub initrd: Part,
    /// The SHA-256 of the agent in it, in hexadecimal.
    pub agent_sha256: String,
    /// The names of the modules in it, in the order of loading.
    pub modules: Vec<String>,
    /// The modules that are loaded when the guest's kernel asks for them; none where all is built in.
    #[serde(default)]
    pub library: Option<Part>,
    /// The package that kernel and modules came from.
    pub package: Option<Package>,
}

impl Manifest {
    /// The files of the image.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Part> {
        [&self.kernel, &self.initrd].into_iter().chain(&self.library)
    }
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name in the image's directory.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

impl Part {
    /// Names the file after what is in it, so that a new image never overwrites a part of the one in use.
    pub(crate) fn of(stem: &str, bytes: &[u8]) -> Self {
        let sha256 = sha256(bytes);
        Self { file: format!("{stem}-{}", &sha256[..12]), size: bytes.len() as u64, sha256 }
    }
}

/// The SHA-256 of `bytes`, in hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
