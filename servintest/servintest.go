// Package servintest uses containers in Go tests:
//
//	func TestStore(t *testing.T) {
//		c := servintest.Run(t, servintest.Request{
//			Image: "redis:7",
//			Ports: []string{"6379/tcp"},
//			Wait:  servintest.ForLog("Ready to accept connections"),
//		})
//		db := open(c.Address("6379/tcp"))
//		…
//	}
//
// The engine is the one that SERVIN_HOST names, else DOCKER_HOST, else the one of
// this host. What a test starts is removed when it ends; if the test's process is
// killed, the engine notices that the lease of its containers is not held any
// more and removes them. (Docker has no leases: there, a killed process leaves
// its containers, which have the label io.servin.lease.)
package servintest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
)

// Request says what to start.
type Request struct {
	Image string
	// Cmd and Entrypoint take the place of the image's.
	Cmd, Entrypoint []string
	Env             map[string]string
	// Ports are published on free ports of the engine's host: "80", "53/udp".
	Ports []string
	// Files are made in the container before it starts: path to content.
	Files map[string][]byte
	// Tmpfs are folders in memory.
	Tmpfs []string
	// Networks are names of networks to join, Aliases what it is called there.
	Networks, Aliases []string
	User, WorkingDir  string
	Labels            map[string]string
	// Wait says when the container is ready; nil is once it runs.
	Wait Strategy
	// Timeout bounds start and wait; 0 is a minute. Pulling is not counted.
	Timeout time.Duration
	// Auth are credentials for the image's registry.
	Auth *registry.AuthConfig
	// Modify can change everything else of the request.
	Modify func(*container.Config, *container.HostConfig)
}

// Container is one that runs for a test.
type Container struct {
	ID string
	c  *client.Client
	// end lets the lease go.
	end func()
}

// defaultTimeout is for starts that say none.
const defaultTimeout = time.Minute

// Run starts a container for a test, which fails if that fails. The container is
// removed with its volumes when the test ends; if the test failed, the end of its
// log is shown.
func Run(tb testing.TB, req Request) *Container {
	tb.Helper()
	c, err := Start(tb.Context(), req)
	if c != nil {
		tb.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), defaultTimeout)
			defer cancel()
			if tb.Failed() {
				tb.Logf("the log of container %s:\n%s", req.Image, c.tail(ctx))
			}
			if err := c.Remove(ctx); err != nil {
				tb.Errorf("cannot remove the container: %v", err)
			}
		})
	}
	if err != nil {
		tb.Fatalf("servintest: %v", err)
	}
	return c
}

// Start is Run for code that is no test: the caller removes the container. With
// an error, a container that was made is given as well, to be looked at.
func Start(ctx context.Context, req Request) (*Container, error) {
	cl, err := connect()
	if err != nil {
		return nil, err
	}
	id, release, err := lease(ctx, cl)
	if err != nil {
		cl.Close()
		return nil, err
	}
	o, err := req.options(id)
	if err != nil {
		release()
		cl.Close()
		return nil, err
	}
	made, err := cl.ContainerCreate(ctx, o)
	if client.IsNotFound(err) {
		if err = cl.ImagePull(ctx, req.Image, client.PullOptions{Auth: req.Auth}, nil); err == nil {
			made, err = cl.ContainerCreate(ctx, o)
		}
	}
	if err != nil {
		release()
		cl.Close()
		return nil, fmt.Errorf("cannot start %s: %w", req.Image, err)
	}
	c := &Container{ID: made.ID, c: cl, end: release}
	limit := req.Timeout
	if limit == 0 {
		limit = defaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := c.put(ctx, req.Files); err != nil {
		return c, err
	}
	if err := cl.ContainerStart(ctx, c.ID, ""); err != nil {
		return c, fmt.Errorf("cannot start %s: %w", req.Image, err)
	}
	if req.Wait != nil {
		if err := req.Wait.wait(ctx, c); err != nil {
			return c, fmt.Errorf("%s is not ready: %w", req.Image, err)
		}
	}
	return c, nil
}

func connect() (*client.Client, error) {
	host := os.Getenv("SERVIN_HOST")
	if host == "" {
		host = os.Getenv("DOCKER_HOST")
	}
	return client.New(client.Config{Host: host, UserAgent: "servintest"})
}

// lease takes a lease and holds it until it is released.
func lease(ctx context.Context, cl *client.Client) (id string, release func(), err error) {
	b := make([]byte, 16)
	if _, err := io.ReadFull(rand.Reader, b); err != nil {
		return "", nil, err
	}
	id = hex.EncodeToString(b)
	hold, cancel := context.WithCancel(context.WithoutCancel(ctx))
	taken := make(chan error, 1)
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		first := true
		for {
			err := cl.Lease(hold, id, func() {
				if first {
					taken <- nil
					first = false
				}
			})
			if first {
				taken <- err
				return
			}
			// The engine may be restarting: the next one is told, too.
			select {
			case <-hold.Done():
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	}()
	release = func() { cancel(); wg.Wait() }
	select {
	case err = <-taken:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if client.IsNotFound(err) { // an engine without leases
		err = nil
	}
	if err != nil {
		release()
		return "", nil, err
	}
	return id, release, nil
}

func (r *Request) options(lease string) (client.ContainerCreateOptions, error) {
	cfg := &container.Config{Image: r.Image, Cmd: r.Cmd, Entrypoint: r.Entrypoint, User: r.User, WorkingDir: r.WorkingDir,
		ExposedPorts: network.PortSet{}, Labels: map[string]string{api.LabelLease: lease}}
	maps.Copy(cfg.Labels, r.Labels)
	for _, k := range slices.Sorted(maps.Keys(r.Env)) {
		cfg.Env = append(cfg.Env, k+"="+r.Env[k])
	}
	h := &container.HostConfig{PortBindings: network.PortMap{}}
	for _, s := range r.Ports {
		p, err := network.ParsePort(s)
		if err != nil {
			return client.ContainerCreateOptions{}, fmt.Errorf("cannot publish %q: %w", s, err)
		}
		cfg.ExposedPorts[p] = struct{}{}
		h.PortBindings[p] = []network.PortBinding{{}}
	}
	for _, t := range r.Tmpfs {
		if h.Tmpfs == nil {
			h.Tmpfs = map[string]string{}
		}
		h.Tmpfs[t] = ""
	}
	o := client.ContainerCreateOptions{Config: cfg, HostConfig: h}
	if len(r.Networks) > 0 {
		h.NetworkMode = container.NetworkMode(r.Networks[0])
		o.Networking = &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{}}
		for _, n := range r.Networks {
			o.Networking.EndpointsConfig[n] = &network.EndpointSettings{Aliases: r.Aliases}
		}
	}
	if r.Modify != nil {
		r.Modify(cfg, h)
	}
	return o, nil
}

// put makes files in a container that does not run yet.
func (c *Container) put(ctx context.Context, files map[string][]byte) error {
	if len(files) == 0 {
		return nil
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: strings.TrimPrefix(name, "/"), Mode: 0o644, Size: int64(len(files[name])), ModTime: time.Now()}); err != nil {
			return err
		}
		if _, err := w.Write(files[name]); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := c.c.ContainerPutArchive(ctx, c.ID, "/", &buf, client.PutArchiveOptions{}); err != nil {
		return fmt.Errorf("cannot put files into the container: %w", err)
	}
	return nil
}

// Remove ends and removes the container.
func (c *Container) Remove(ctx context.Context) error {
	err := c.c.ContainerRemove(ctx, c.ID, client.RemoveOptions{Force: true, Volumes: true})
	c.end()
	c.c.Close()
	if client.IsNotFound(err) {
		return nil
	}
	return err
}

// Stop stops the container and keeps it.
func (c *Container) Stop(ctx context.Context) error {
	return c.c.ContainerStop(ctx, c.ID, client.StopOptions{})
}

// Inspect tells all about it.
func (c *Container) Inspect(ctx context.Context) (container.InspectResponse, error) {
	in, _, err := c.c.ContainerInspect(ctx, c.ID, false)
	return in, err
}

// Host is where published ports are reached.
func (c *Container) Host() string {
	if u, err := url.Parse(c.c.Host()); err == nil && (u.Scheme == "tcp" || u.Scheme == "ssh") {
		return u.Hostname()
	}
	return "127.0.0.1"
}

// Port is the host's port that a port was published on; it panics if it was not,
// which is a mistake of the test.
func (c *Container) Port(port string) int {
	n, err := c.port(context.Background(), port)
	if err != nil {
		panic("servintest: " + err.Error())
	}
	return n
}

// Address is host and port together, for net.Dial.
func (c *Container) Address(port string) string {
	return net.JoinHostPort(c.Host(), strconv.Itoa(c.Port(port)))
}

func (c *Container) port(ctx context.Context, port string) (int, error) {
	p, err := network.ParsePort(port)
	if err != nil {
		return 0, err
	}
	in, err := c.Inspect(ctx)
	if err != nil {
		return 0, err
	}
	if in.NetworkSettings != nil {
		for _, b := range in.NetworkSettings.Ports[p] {
			if n, err := strconv.Atoi(b.HostPort); err == nil && n > 0 && b.HostIP != netip.IPv6Unspecified() {
				return n, nil
			}
		}
	}
	return 0, fmt.Errorf("port %s of the container is not published", port)
}

// Logs gives what the container wrote so far, both streams.
func (c *Container) Logs(ctx context.Context) (string, error) {
	var b bytes.Buffer
	err := c.c.ContainerLogs(ctx, c.ID, client.LogOptions{Stdout: true, Stderr: true}, &b, &b)
	return b.String(), err
}

// tail is the end of the log, for people.
func (c *Container) tail(ctx context.Context) string {
	var b bytes.Buffer
	if err := c.c.ContainerLogs(ctx, c.ID, client.LogOptions{Stdout: true, Stderr: true, Tail: "50"}, &b, &b); err != nil {
		return err.Error()
	}
	return b.String()
}

// Result is what came of a command.
type Result struct {
	Stdout, Stderr string
	ExitCode       int
}

// Exec runs a command in the container.
func (c *Container) Exec(ctx context.Context, cmd ...string) (Result, error) {
	id, err := c.c.ExecCreate(ctx, c.ID, container.ExecCreateRequest{Cmd: cmd, AttachStdout: true, AttachStderr: true})
	if err != nil {
		return Result{}, err
	}
	st, err := c.c.ExecStart(ctx, id, container.ExecStartRequest{})
	if err != nil {
		return Result{}, err
	}
	defer st.Close()
	var out, errb bytes.Buffer
	if err := client.Demux(&out, &errb, st); err != nil {
		return Result{}, err
	}
	for d := time.Millisecond; ; d = min(2*d, 100*time.Millisecond) {
		in, err := c.c.ExecInspect(ctx, id)
		if err != nil {
			return Result{}, err
		}
		if !in.Running && in.ExitCode != nil {
			return Result{out.String(), errb.String(), *in.ExitCode}, nil
		}
		if err := pause(ctx, d); err != nil {
			return Result{}, err
		}
	}
}

// ReadFile reads a file of the container, whether it runs or not.
func (c *Container) ReadFile(ctx context.Context, path string) ([]byte, error) {
	r, _, err := c.c.ContainerGetArchive(ctx, c.ID, path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	tr := tar.NewReader(r)
	if h, err := tr.Next(); err != nil {
		return nil, err
	} else if h.Typeflag != tar.TypeReg {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	return io.ReadAll(tr)
}

// Network makes a network for a test, which goes when the test ends, and gives
// its name.
func Network(tb testing.TB) string {
	tb.Helper()
	cl, err := connect()
	if err != nil {
		tb.Fatalf("servintest: %v", err)
	}
	id, release, err := lease(tb.Context(), cl)
	if err != nil {
		tb.Fatalf("servintest: %v", err)
	}
	name := "servintest-" + id
	n, err := cl.NetworkCreate(tb.Context(), network.CreateRequest{Name: name, Labels: map[string]string{api.LabelLease: id}})
	if err != nil {
		release()
		tb.Fatalf("servintest: cannot make a network: %v", err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), defaultTimeout)
		defer cancel()
		if err := cl.NetworkRemove(ctx, n.ID); err != nil && !client.IsNotFound(err) {
			tb.Errorf("cannot remove the network: %v", err)
		}
		release()
		cl.Close()
	})
	return name
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errEnded = errors.New("the container has ended")
