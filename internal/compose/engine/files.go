package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/compose/spec"
)

// putFiles copies secrets and configs that no file of the host holds into a
// container that does not run yet.
func (e *Engine) putFiles(ctx context.Context, p *types.Project, s *types.ServiceConfig, id string) error {
	files, err := spec.Files(p, s)
	if err != nil || len(files) == 0 {
		return err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	owners := false
	for _, f := range files {
		h := &tar.Header{Name: strings.TrimPrefix(f.Target, "/"), Mode: f.Mode, Size: int64(len(f.Content)), ModTime: time.Now()}
		for _, v := range []struct {
			text string
			to   *int
		}{{f.UID, &h.Uid}, {f.GID, &h.Gid}} {
			if v.text == "" {
				continue
			}
			if *v.to, err = strconv.Atoi(v.text); err != nil {
				return fmt.Errorf("cannot put %s into service %q: the owner %q is not a number", f.Target, s.Name, v.text)
			}
			owners = true
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.WriteString(w, f.Content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return e.Client.ContainerPutArchive(ctx, id, "/", &buf, client.PutArchiveOptions{CopyUIDGID: owners})
}

// Output is where something writes.
type Output struct{ Stdout, Stderr io.WriteCloser }

func (o Output) close() {
	for _, w := range []io.WriteCloser{o.Stdout, o.Stderr} {
		if w != nil {
			w.Close()
		}
	}
}

// Hook runs a command of a service's life cycle in a container.
func (e *Engine) Hook(ctx context.Context, s *types.ServiceConfig, h types.ServiceHook, id string, out Output) error {
	defer out.close()
	var env []string
	for k, v := range h.Environment {
		if v != nil {
			env = append(env, k+"="+*v)
		}
	}
	code, err := e.Exec(ctx, id, container.ExecCreateRequest{User: h.User, Privileged: h.Privileged, WorkingDir: h.WorkingDir, Env: env, Cmd: h.Command}, nil, out)
	if err != nil {
		return err
	}
	if code != 0 {
		return fmt.Errorf("%s hook exited with status %d", s.Name, code)
	}
	return nil
}

// Exec runs a command in a container without a terminal and gives its exit code.
func (e *Engine) Exec(ctx context.Context, id string, req container.ExecCreateRequest, in io.Reader, out Output) (int, error) {
	req.AttachStdout, req.AttachStderr, req.AttachStdin = true, true, in != nil
	xid, err := e.Client.ExecCreate(ctx, id, req)
	if err != nil {
		return 0, err
	}
	st, err := e.Client.ExecStart(ctx, xid, container.ExecStartRequest{})
	if err != nil {
		return 0, err
	}
	defer st.Close()
	if in != nil {
		go func() {
			io.Copy(st, in)
			st.CloseWrite()
		}()
	}
	var stdout, stderr io.Writer = io.Discard, io.Discard
	if out.Stdout != nil {
		stdout = out.Stdout
	}
	if out.Stderr != nil {
		stderr = out.Stderr
	}
	if err := client.Demux(stdout, stderr, st); err != nil {
		return 0, err
	}
	d := 5 * time.Millisecond
	for range 60 {
		in, err := e.Client.ExecInspect(ctx, xid)
		if err != nil {
			return 0, err
		}
		if !in.Running && in.ExitCode != nil {
			return *in.ExitCode, nil
		}
		if err := pause(ctx, &d); err != nil {
			return 0, err
		}
	}
	return 0, errors.New("a command closed its output and goes on")
}
