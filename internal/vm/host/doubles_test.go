package host

import (
	"context"
	"io"
	"log/slog"
	"testing"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vm"
)

func quietLog() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func shareOf(path string) vm.Share { return vm.Share{VMShare: api.VMShare{Path: path}} }

func newLive(t *testing.T) *live {
	l := &live{hot: map[string]string{}, pending: map[string]bool{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	t.Cleanup(l.cancel)
	return l
}
