package engine

import (
	"fmt"
	"maps"
	"slices"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/logs/driver"
	"github.com/cloudos-io/cloudos/internal/logs/remote"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// LogShipper sends the logs of remote drivers on.
type LogShipper interface {
	// Path is where the monitor of a container writes.
	Path(id string) string
	// Prepare makes what that needs, before a start.
	Prepare(src remote.Source) error
	Started(id string)
	Ended(id string)
	// Retire tells that a container is removed.
	Retire(id string) error
	// Retain retires the logs of unknown containers.
	Retain(known func(id string) bool) error
	Status() remote.Status
}

// logDrivers are those that this engine has.
func (e *Engine) logDrivers() []string {
	l := driver.Names()
	if e.cfg.LogShipper == nil {
		l = slices.DeleteFunc(l, driver.Remote)
	}
	return l
}

// checkLogConfig fills in and checks the log driver.
func (e *Engine) checkLogConfig(l *mcontainer.LogConfig) error {
	if l.Type == "" {
		l.Type = e.cfg.LogDriver
	}
	if l.Config == nil {
		l.Config = map[string]string{}
	}
	if l.Type == e.cfg.LogDriver && len(e.cfg.LogOptions) > 0 {
		all := maps.Clone(e.cfg.LogOptions)
		maps.Copy(all, l.Config)
		l.Config = all
	}
	_, err := e.logOptions(*l)
	return err
}

func (e *Engine) logOptions(l mcontainer.LogConfig) (driver.Settings, error) {
	if driver.Remote(l.Type) && e.cfg.LogShipper == nil {
		return driver.Settings{}, fault.New(fault.Invalid, "logger: no log driver named '%s' is registered", l.Type)
	}
	return driver.Parse(l.Type, l.Config, driver.Defaults{MaxSize: e.cfg.LogMaxSize, MaxFiles: e.cfg.LogMaxFiles})
}

// logSettings turns a log configuration into the monitor's.
func (e *Engine) logSettings(l mcontainer.LogConfig) (runtime.Log, error) {
	s, err := e.logOptions(l)
	return runtime.Log{Format: s.Format, MaxSize: s.MaxSize, MaxFiles: s.MaxFiles, NonBlocking: s.NonBlocking, BufferSize: s.BufferSize}, err
}

// logContainer is what logs say about a container.
func (e *Engine) logContainer(r *container.Record) driver.Container {
	return driver.Container{
		ContainerID: r.ID, ContainerName: "/" + r.Name, ContainerEntrypoint: r.Path, ContainerArgs: r.Args,
		ContainerImageID: r.Image.ID, ContainerImageName: r.Config.Image, ContainerCreated: r.Created,
		ContainerEnv: r.Config.Env, ContainerLabels: r.Config.Labels, LogPath: e.logPath(r), DaemonName: "docker",
	}
}

// remoteLog tells whether a container's log is sent on.
func (e *Engine) remoteLog(r *container.Record) bool {
	return e.cfg.LogShipper != nil && driver.Remote(r.HostConfig.LogConfig.Type)
}

// prepareLog makes what a container's log needs before its start.
func (e *Engine) prepareLog(r *container.Record) error {
	if !e.remoteLog(r) {
		return nil
	}
	c := r.HostConfig.LogConfig
	src, err := remote.NewSource(c.Type, c.Config, e.logContainer(r))
	if err == nil {
		err = e.cfg.LogShipper.Prepare(src)
	}
	if err != nil {
		return fmt.Errorf("cannot prepare the container's log: %w", err)
	}
	return nil
}

// logStarted and logEnded tell the shipper of a run.
func (e *Engine) logStarted(r *container.Record) {
	if e.remoteLog(r) {
		e.cfg.LogShipper.Started(r.ID)
	}
}

func (e *Engine) logEnded(r *container.Record) {
	if e.remoteLog(r) {
		e.cfg.LogShipper.Ended(r.ID)
	}
}

// dropLog removes a container's log, once it is sent.
func (e *Engine) dropLog(u *unit, r *container.Record) error {
	if r.Pod != nil {
		return nil // the kubelet keeps the logs of pods
	}
	if e.remoteLog(r) {
		return e.cfg.LogShipper.Retire(r.ID)
	}
	return removeLogs(u.log)
}

// retainLogs retires the logs of containers that went while no engine ran.
func (e *Engine) retainLogs() {
	if e.cfg.LogShipper == nil {
		return
	}
	if err := e.cfg.LogShipper.Retain(func(id string) bool { return e.units[id] != nil }); err != nil {
		e.log.Warn("cannot retire logs of containers that are gone", "cause", err)
	}
}

// logTrouble says what remote logs suffer from, for info.
func (e *Engine) logTrouble() []string {
	if e.cfg.LogShipper == nil {
		return nil
	}
	var out []string
	for id, why := range e.cfg.LogShipper.Status().Trouble {
		out = append(out, fmt.Sprintf("The log of container %s cannot be sent: %s", short(id), why))
	}
	slices.Sort(out)
	return out
}
