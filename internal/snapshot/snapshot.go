// Package snapshot is the contract of container file systems: the read-only
// chain of an image's layers below and a container's writable layer on top.
// Package snapshot/overlay implements it with overlayfs. The engine imports the
// contract; package image produces chains.
package snapshot

import (
	"context"
	"io"
	"os"

	"github.com/moby/moby/api/types/container"
)

// Chain is an unpacked image: its layers' directories, topmost first. It stays
// valid until the image is removed and no writable layer refers to it.
type Chain struct {
	ID   string   // chain id (digest), "" for the empty file system
	Dirs []string // topmost first
}

// IDMap maps ids of a container to ids of the host. Zero value: identity.
type IDMap struct {
	UIDs, GIDs []IDRange
}

// IDRange maps Size ids from Container on to Host on.
type IDRange struct{ Container, Host, Size uint32 }

// Store holds writable layers, each named by its container's id.
type Store interface {
	// Create makes an empty writable layer. Ephemeral ones live under the run
	// root, are not synced and are mounted volatile. sizeLimit 0 is no limit.
	Create(ctx context.Context, id string, chain Chain, ephemeral bool, sizeLimit int64) error
	// Mount returns a detached mount of chain and writable layer: a mount
	// descriptor that move_mount can attach anywhere and openat2 can walk before.
	// With m the layers are idmapped. The mount ends when the last descriptor and
	// attachment go. Mounting a layer twice at the same time is the caller's fault.
	Mount(ctx context.Context, id string, readonly bool, m IDMap) (*os.File, error)
	// MountLabelled is Mount, writable, with one SELinux label for all that is in it.
	MountLabelled(ctx context.Context, id string, m IDMap, label string) (*os.File, error)
	// Chain is what a writable layer stands on.
	Chain(id string) (Chain, error)
	// MountChain mounts the chain alone, read-only.
	MountChain(ctx context.Context, chain Chain, m IDMap) (*os.File, error)
	// MountChainLabelled is MountChain with one SELinux label for all that is in it.
	MountChainLabelled(ctx context.Context, chain Chain, m IDMap, label string) (*os.File, error)
	// Changes lists what differs from the chain (docker diff).
	Changes(ctx context.Context, id string) ([]container.FilesystemChange, error)
	// Diff streams the writable layer as an OCI layer tar (whiteouts included).
	Diff(ctx context.Context, id string, w io.Writer) error
	// Usage is the bytes the writable layer takes on disk.
	Usage(ctx context.Context, id string) (int64, error)
	// Dirs tells upper and work directories for inspect's GraphDriver data.
	Dirs(id string) (lower []string, upper, work, merged string, err error)
	// Remove deletes the layer; idempotent. It returns when nothing of it is
	// visible under its name (deletion of many files may go on in the background).
	Remove(ctx context.Context, id string) error
	// Drain deletes what removed layers left on the disk.
	Drain(ctx context.Context) error
	// List names every layer there is.
	List(ctx context.Context) ([]string, error)
}
