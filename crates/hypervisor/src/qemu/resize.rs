//! Giving a running machine more, or fewer, vCPUs and memory.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::NAME;
use super::vm::QemuVm;
use crate::Error;

/// For the guest to take memory.
const PLUG: Duration = Duration::from_mins(1);

/// For the guest to give memory. What it has not given by then it may still give later.
const UNPLUG_MEMORY: Duration = Duration::from_secs(5);

/// For a guest to notice a new vCPU, or to move all work off one.
const CPU: Duration = Duration::from_secs(30);

/// ACPI 6.5, table 6.62, and section 5.6.6: what the host had asked for.
mod source {
    /// To look at a device that is new.
    pub(super) const CHECK: u64 = 1;
    /// To let one go.
    pub(super) const EJECTION: u64 = 3;
}

const MIB: u64 = 1 << 20;

/// One line of `query-hotpluggable-cpus`.
#[derive(Debug, Deserialize)]
struct CpuSlot {
    r#type: String,
    props: Value,
    /// There where a vCPU is in it.
    #[serde(rename = "qom-path")]
    qom_path: Option<String>,
}

impl QemuVm {
    /// Adds or removes vCPUs. Those of the boot stay.
    pub(super) async fn resize_vcpus(&mut self, wanted: u32) -> Result<(), Error> {
        const OPERATION: &str = "change the number of vCPUs";
        let wanted = wanted.clamp(1, self.shape.max_vcpus);
        if wanted == self.shape.vcpus {
            return Ok(());
        }
        let slots = self.command(OPERATION, "query-hotpluggable-cpus", json!({})).await?;
        let mut slots: Vec<CpuSlot> = serde_json::from_value(slots).map_err(|error| {
            Error::Refused { driver: NAME, operation: OPERATION, message: error.to_string() }
        })?;
        // QEMU lists the highest first.
        slots.reverse();
        let present = slots.iter().filter(|slot| slot.qom_path.is_some()).count();
        self.shape.vcpus = u32::try_from(present).unwrap_or(u32::MAX);
        for (number, slot) in slots.iter().enumerate() {
            if self.shape.vcpus >= wanted {
                break;
            }
            if slot.qom_path.is_none() {
                let mut options = slot.props.clone();
                options["driver"] = slot.r#type.clone().into();
                options["id"] = cpu(number).into();
                self.forget_events();
                self.command(OPERATION, "device_add", options).await?;
                self.shape.vcpus += 1;
                self.guest_has_seen(OPERATION, number, source::CHECK).await?;
            }
        }
        for (number, slot) in slots.iter().enumerate().rev() {
            if self.shape.vcpus <= wanted {
                break;
            }
            // Those of the boot have no id of ours, and no way out.
            if slot
                .qom_path
                .as_ref()
                .is_some_and(|path| path.ends_with(&format!("/{}", cpu(number))))
            {
                self.unplug_cpu(OPERATION, number).await?;
                self.shape.vcpus -= 1;
            }
        }
        Ok(())
    }

    /// Asks the guest to let a vCPU go, and waits until it has.
    async fn unplug_cpu(&mut self, operation: &'static str, number: usize) -> Result<(), Error> {
        self.forget_events();
        self.command(operation, "device_del", json!({ "id": cpu(number) })).await?;
        self.guest_has_seen(operation, number, source::EJECTION).await
    }

    /// Waits until the guest has done with a vCPU what it was asked for.
    ///
    /// The sign is the guest's own report, ACPI's `_OST`: of a vCPU that went QEMU 7.2 keeps the object under emulation, and
    /// never says that it was deleted.
    async fn guest_has_seen(
        &mut self,
        operation: &'static str,
        number: usize,
        asked: u64,
    ) -> Result<(), Error> {
        /// ACPI 6.5, table 6.64: it goes on.
        const IN_PROGRESS: u64 = 0x84;
        let status = |data: &Value| {
            let info = data.get("info")?;
            let ours = info.get("slot")?.as_str()? == number.to_string()
                && info.get("source")?.as_u64()? == asked;
            info.get("status")?.as_u64().filter(|status| ours && *status != IN_PROGRESS)
        };
        let report = |name: &str, data: &Value| name == "ACPI_DEVICE_OST" && status(data).is_some();
        let report = self.event(operation, CPU, report).await?;
        match status(&report) {
            Some(0) => Ok(()),
            status => Err(Error::Refused {
                driver: NAME,
                operation,
                message: format!("the guest refuses for vCPU {number} (ACPI status {status:?})"),
            }),
        }
    }

    /// Asks the guest to take or give memory until the machine has `wanted` MiB, and waits for it.
    pub(super) async fn resize_memory(&mut self, wanted: u32) -> Result<(), Error> {
        const OPERATION: &str = "change the size of the memory";
        // The device's unit is 2 MiB.
        let extra = wanted.saturating_sub(self.shape.base_memory_mib).next_multiple_of(2);
        let extra = extra.min(self.shape.max_extra_memory_mib);
        if extra == self.shape.extra_memory_mib {
            return Ok(());
        }
        let bytes = u64::from(extra) * MIB;
        self.forget_events();
        let property = json!({ "path": "mem", "property": "requested-size", "value": bytes });
        self.command(OPERATION, "qom-set", property).await?;
        let done = |name: &str, data: &Value| {
            name == "MEMORY_DEVICE_SIZE_CHANGE"
                && data.get("size").and_then(Value::as_u64) == Some(bytes)
        };
        let deadline = if extra > self.shape.extra_memory_mib { PLUG } else { UNPLUG_MEMORY };
        match self.event(OPERATION, deadline, done).await {
            // A guest that uses its memory cannot give it.
            Ok(_) | Err(Error::Timeout { .. }) => {}
            Err(error) => return Err(error),
        }
        let property = json!({ "path": "mem", "property": "size" });
        let size = self.command(OPERATION, "qom-get", property).await?;
        let mib = size.as_u64().unwrap_or_default() / MIB;
        self.shape.extra_memory_mib = u32::try_from(mib).unwrap_or(extra);
        Ok(())
    }
}

fn cpu(number: usize) -> String {
    format!("cpu{number}")
}
