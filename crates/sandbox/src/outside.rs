//! A thread that stays in the namespaces in which the process began, for what must be done there after the process has
//! moved into a sandbox's: hooks, mounts for others to see, a look at what others have mounted since.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use tokio::sync::oneshot;

use crate::error::Error;

type Work = Box<dyn FnOnce() + Send>;

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Outside {
    work: mpsc::Sender<Work>,
    id: rustix::thread::Pid,
}

impl Outside {
    /// Starts the thread, in the calling thread's namespaces.
    ///
    /// # Errors
    ///
    /// When there can be no more threads.
    pub(crate) fn start() -> Result<Self, Error> {
        let failed = |source| Error::Host { action: "start", path: "a thread".into(), source };
        let (work, orders) = mpsc::channel::<Work>();
        let (started, id) = mpsc::channel();
        let serve = move || {
            if started.send(rustix::thread::gettid()).is_err() {
                return;
            }
            for order in orders {
                order();
            }
        };
        thread::Builder::new().name("outside".into()).spawn(serve).map_err(failed)?;
        let id = id.recv().map_err(|_| failed(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { work, id })
    }

    /// The mount namespace that it is in.
    pub(crate) fn mounts(&self) -> PathBuf {
        let id = self.id.as_raw_pid();
        PathBuf::from(format!("/proc/{}/task/{id}/ns/mnt", std::process::id()))
    }

    /// Does something there, while this thread does other things.
    ///
    /// # Errors
    ///
    /// What `action` says.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        action: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let gone = || Error::Host {
            action: "reach",
            path: "the thread outside".into(),
            source: io::ErrorKind::BrokenPipe.into(),
        };
        let (answer, answered) = oneshot::channel();
        let order: Work = Box::new(move || drop(answer.send(action())));
        self.work.send(order).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

#[cfg(test)]
mod tests {
    use super::Outside;

    #[test]
    fn it_stays_where_it_was_started() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let namespace = || Ok(std::fs::read_link("/proc/thread-self/ns/mnt").unwrap());
        let here = namespace().unwrap();
        let (outside, there) = std::thread::spawn(move || {
            let outside = Outside::start().unwrap();
            linux::namespace::unshare_mounts().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let there = runtime.block_on(outside.run(namespace)).unwrap();
            assert_ne!(namespace().unwrap(), there);
            (std::fs::read_link(outside.mounts()).unwrap(), there)
        })
        .join()
        .unwrap();
        assert_eq!((here.clone(), here), (outside, there));
    }
}
