package criapi

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/audit"
)

// TestAudited calls over a socket: who called shows, and of the request no more
// than may.
func TestAudited(t *testing.T) {
	dir := t.TempDir()
	log, err := audit.Open(audit.Config{Dir: filepath.Join(dir, "audit")})
	if err != nil {
		t.Fatal(err)
	}
	s := New(Config{Socket: "unix://" + dir + "/s", Audit: log, Version: "1"})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	c, err := grpc.NewClient("unix:"+dir+"/s", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	rt := v1.NewRuntimeServiceClient(c)
	if _, err := rt.Version(ctx, &v1.VersionRequest{}); err != nil {
		t.Error(err)
	}
	// There is no engine behind it: the call fails, and is recorded all the same.
	if _, err := rt.ExecSync(ctx, &v1.ExecSyncRequest{ContainerId: "box", Cmd: []string{"/bin/echo", "hidden"}}); err == nil {
		t.Error("a call without an engine succeeded")
	}
	c.Close()
	cancel()
	<-done
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	var begin, end api.AuditRecord
	if err := log.Read(context.Background(), time.Time{}, false, func(b []byte) error {
		r, err := api.OpenAudit(b)
		if strings.Contains(string(b), "hidden") || strings.Contains(string(b), "Version") {
			t.Errorf("recorded: %s", b)
		}
		switch r.Event {
		case "begin":
			begin = r
		case "end":
			end = r
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if begin.Method != "cri ExecSync" || begin.Object != "box" || begin.Attrs["command"] != "echo" || begin.Who == nil || begin.Who.UID == nil || begin.Who.Edge != "cri" {
		t.Errorf("begin: %+v %+v", begin, begin.Who)
	}
	if end.Call != begin.Seq || end.Status == 0 {
		t.Errorf("end: %+v", end)
	}
}
