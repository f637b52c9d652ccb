package native

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	osexec "os/exec"
	"time"

	"github.com/cloudos-io/cloudos/internal/plan"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func (t *task) stateJSON(status specs.ContainerState, pid int) []byte {
	b, _ := json.Marshal(specs.State{Version: specs.Version, ID: t.id, Status: status, Pid: pid, Bundle: t.bundle, Annotations: t.labels})
	return b
}

// hostHook runs a hook in the host's namespaces.
func hostHook(ctx context.Context, h specs.Hook, state []byte) error {
	if h.Timeout != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(*h.Timeout)*time.Second)
		defer cancel()
	}
	cmd := osexec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env = h.Env
	if cmd.Env == nil {
		cmd.Env = []string{}
	}
	cmd.Stdin = bytes.NewReader(state)
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if len(out.b) > 0 {
			err = errors.Join(err, errors.New(string(bytes.TrimSpace(out.b))))
		}
		return &contract.StartError{Step: "run hook " + h.Path, Err: err}
	}
	return nil
}

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > 2048 {
		t.b = append(t.b[:0], t.b[len(t.b)-1024:]...)
	}
	return len(p), nil
}

// earlyHooks run between the mounts and pivot_root: prestart and createRuntime
// on the host, createContainer in the container's namespaces.
func (s *start) earlyHooks(ctx context.Context) error {
	h := s.spec.Hooks
	state := s.task.stateJSON(specs.StateCreating, s.task.pid)
	//nolint:staticcheck // prestart is deprecated, not gone
	for _, hook := range append(append([]specs.Hook(nil), h.Prestart...), h.CreateRuntime...) {
		if err := hostHook(ctx, hook, state); err != nil {
			return err
		}
	}
	if len(h.CreateContainer) == 0 {
		return nil
	}
	return s.stageHooks(ctx, h.CreateContainer, specs.StateCreating)
}

// stageHooks has the stage itself run hooks, where it stands.
func (s *start) stageHooks(ctx context.Context, hooks []specs.Hook, status specs.ContainerState) error {
	p, err := plan.Hooks(hooks, s.task.stateJSON(status, s.task.pid))
	if err != nil {
		return err
	}
	return s.runPlan(ctx, p, nil)
}

// poststart hooks may fail without consequence, as the runtime spec has it.
func (t *task) poststart(ctx context.Context) {
	if t.hooks == nil {
		return
	}
	for _, h := range t.hooks.Poststart {
		if err := hostHook(ctx, h, t.stateJSON(specs.StateRunning, t.Pid())); err != nil {
			t.d.log.Warn("a poststart hook failed", "id", t.id, "error", err)
		}
	}
}

func (t *task) poststop(ctx context.Context) {
	if t.hooks == nil {
		return
	}
	for _, h := range t.hooks.Poststop {
		if err := hostHook(ctx, h, t.stateJSON(specs.StateStopped, 0)); err != nil {
			t.d.log.Warn("a poststop hook failed", "id", t.id, "error", err)
		}
	}
}
