package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Where the kernel lists what hosts without named serial ports have: virtio's sockets (Apple's
// framework) and Hyper-V's bus.
const (
	virtioDevices = "/sys/bus/virtio/devices"
	virtioVsock   = "0x0013" // the device's number in virtio's specification
	hypervBus     = "/sys/bus/vmbus"
)

// VsockModule is the kernel module for the sockets to the machine's host; empty is that it has none.
func VsockModule() string {
	devices, err := filepath.Glob(filepath.Join(virtioDevices, "*", "device"))
	if err != nil {
		return ""
	}
	for _, d := range devices {
		if b, err := os.ReadFile(d); err == nil && strings.TrimSpace(string(b)) == virtioVsock {
			return "vmw_vsock_virtio_transport"
		}
	}
	if _, err := os.Stat(hypervBus); err == nil {
		return "hv_sock"
	}
	return ""
}

// RunVsock serves on the vsock port what Run serves on a serial port, until ctx is done.
func (p *Port) RunVsock(ctx context.Context) error {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, vmwire.VsockPort, nil)
	if err != nil {
		return fmt.Errorf("cannot serve the host: %w", err)
	}
	return p.accept(ctx, l, func(a net.Addr) bool { // and no container of the machine's
		v, ok := a.(*vsock.Addr)
		return ok && v.ContextID == unix.VMADDR_CID_HOST
	})
}

// Serve serves on a listener that none but the host reaches what Run serves on a serial port, until ctx is done.
func (p *Port) Serve(ctx context.Context, l net.Listener) error {
	return p.accept(ctx, l, func(net.Addr) bool { return true })
}

// accept serves conversations with the host. A new one ends the one before: of a host that is gone,
// nobody may have said so.
func (p *Port) accept(ctx context.Context, l net.Listener, host func(net.Addr) bool) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var last net.Conn
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			if last != nil {
				last.Close()
			}
			return ctx.Err()
		}
		if err != nil {
			p.Log("the port: %v", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		if !host(c.RemoteAddr()) {
			p.Log("the port: %v is not the host", c.RemoteAddr())
			c.Close()
			continue
		}
		if last != nil {
			last.Close()
		}
		last = c
		wg.Go(func() {
			defer c.Close()
			s, err := vmwire.Guest(c)
			if err == nil {
				p.serve(ctx, s)
			} else if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				p.Log("the port: %v", err)
			}
		})
	}
}
