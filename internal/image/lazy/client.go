package lazy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Client talks to the process that serves layers, and starts it when needed.
type Client struct {
	// Dir is the run directory: the socket, the lock and the log are there.
	Dir string
	// UserNS says that overlayfs keeps its marks in user attributes.
	UserNS bool
	// Idle is how long nobody may have read before the rest is fetched; a
	// negative one never fetches it unasked.
	Idle time.Duration
}

// Prepare has the process open a blob; state is the blob's directory.
func (c *Client) Prepare(ctx context.Context, b Blob, state string, access any) (Prepared, error) {
	raw, err := json.Marshal(access)
	if err != nil {
		return Prepared{}, err
	}
	r, err := c.do(ctx, true, request{Op: "prepare", Blob: b, State: state, Access: raw, UserNS: c.UserNS, Idle: c.Idle})
	if err != nil {
		return Prepared{}, err
	}
	return *r.Prepared, nil
}

// Mount has a prepared blob served at dir as the layer id.
func (c *Client) Mount(ctx context.Context, b Blob, id, dir string, attrs map[string]Attr) error {
	_, err := c.do(ctx, false, request{Op: "mount", Blob: b, ID: id, Dir: dir, Attrs: attrs})
	return err
}

// Access gives the process new credentials for a blob.
func (c *Client) Access(ctx context.Context, b Blob, access any) error {
	raw, err := json.Marshal(access)
	if err != nil {
		return err
	}
	_, err = c.do(ctx, false, request{Op: "access", Blob: b, Access: raw})
	return err
}

// Hurry has the rest of a blob fetched now.
func (c *Client) Hurry(ctx context.Context, d digest.Digest) error {
	_, err := c.do(ctx, false, request{Op: "hurry", Blob: Blob{Digest: d}})
	return err
}

// Spoil says that a complete blob is not what it should be: all is fetched anew.
func (c *Client) Spoil(ctx context.Context, d digest.Digest) error {
	_, err := c.do(ctx, false, request{Op: "spoil", Blob: Blob{Digest: d}})
	return err
}

// Status tells what is served; nothing if no process is there.
func (c *Client) Status(ctx context.Context) (Status, error) {
	r, err := c.do(ctx, false, request{Op: "status"})
	return r.status(), err
}

// Wait returns when the status is another than the one numbered gen.
func (c *Client) Wait(ctx context.Context, gen uint64) (Status, error) {
	r, err := c.do(ctx, false, request{Op: "wait", Gen: gen})
	return r.status(), err
}

func (r response) status() Status {
	if r.Status == nil {
		return Status{}
	}
	return *r.Status
}

// ErrNoProcess says that no process serves layers.
var ErrNoProcess = errors.New("no process serves layers")

func (c *Client) do(ctx context.Context, start bool, r request) (response, error) {
	line, err := json.Marshal(r)
	if err != nil {
		return response{}, err
	}
	for try := 0; ; try++ {
		conn, err := c.dial(ctx, start)
		if err != nil {
			return response{}, err
		}
		out, err := exchange(ctx, conn, append(line, '\n'))
		if errors.Is(err, io.EOF) && start && try < 2 && ctx.Err() == nil {
			continue // it was about to end
		}
		return out, err
	}
}

func exchange(ctx context.Context, conn net.Conn, line []byte) (response, error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var out response
	_, err := conn.Write(line)
	if err == nil {
		err = json.NewDecoder(bufio.NewReader(conn)).Decode(&out)
	}
	switch {
	case ctx.Err() != nil:
		return out, ctx.Err()
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return out, io.EOF
	case err != nil:
		return out, fmt.Errorf("cannot talk to the process that serves layers: %w", err)
	case out.Error != "":
		return out, fault.New(out.Kind, "%s", out.Error)
	}
	return out, nil
}

func (c *Client) dial(ctx context.Context, start bool) (net.Conn, error) {
	sock := filepath.Join(c.Dir, socketName)
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", sock)
	if err == nil {
		return conn, nil
	}
	if !start {
		return nil, ErrNoProcess
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, err
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		// One that is about to end may still hold the lock: then this one goes.
		if err := c.start(); err != nil {
			return nil, fmt.Errorf("cannot start the process that serves layers: %w", err)
		}
		for range 100 {
			if conn, err = d.DialContext(ctx, "unix", sock); err == nil {
				return conn, nil
			}
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			time.Sleep(10 * time.Millisecond)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the process that serves layers does not answer: %w", err)
		}
	}
}

// start runs the program again as Main, in a session of its own.
func (c *Client) start() error {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{Argv0, c.Dir}
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "GOMEMLIMIT=96MiB")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return nil
}

// Detach takes the mount at dir away, whoever serves it. What uses it goes on.
func Detach(dir string) error {
	for isMounted(dir) {
		if err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return &os.PathError{Op: "umount", Path: dir, Err: err}
		}
	}
	return nil
}

// isMounted tells whether dir is the root of a mount; it asks no server.
func isMounted(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, 0, &st)
	if err != nil {
		return errors.Is(err, unix.ENOTCONN) // of a server that is gone
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// Mounted tells whether a layer is served at dir by a process that lives.
func Mounted(dir string) bool {
	var st unix.Statfs_t
	return isMounted(dir) && unix.Statfs(dir, &st) == nil && st.Type == unix.FUSE_SUPER_MAGIC
}
