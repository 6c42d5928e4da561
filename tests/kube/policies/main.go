// policies enforces NetworkPolicies on one node of a cluster for tests: it is kube-network-policies of SIG Network, with
// rules of its own that hand new connections to it.
//
// kube-network-policies lays rules with nftables' own `queue`, which not every kernel has (CONFIG_NFT_QUEUE); where it
// cannot, it says so in its log and goes on to answer for what is queued. The same queue is reached through the older
// target of xtables, which is what the rules here use. A connection that nobody answers for is dropped, so nothing gets
// through before the policies are known.
package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"
)

const queue = 100

func main() {
	config := flag.String("kubeconfig", "", "file that says how to reach the API server")
	node := flag.String("node", "", "name of this node")
	pods := flag.String("pods", "", "addresses of all pods")
	laid := flag.String("laid", "", "file that is made when the rules are laid")
	flag.Parse()
	if err := run(*config, *node, *pods, *laid); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(file, node, pods, laid string) error {
	addresses, err := netip.ParsePrefix(pods)
	if err != nil {
		return err
	}
	if err := lay(addresses); err != nil {
		return fmt.Errorf("the rules cannot be laid: %w", err)
	}
	if err := os.WriteFile(laid, nil, 0o644); err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer cancel()
	config, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	controller, err := networkpolicy.NewController(
		client,
		factory.Networking().V1().NetworkPolicies(),
		factory.Core().V1().Namespaces(),
		factory.Core().V1().Pods(),
		nil, nil, nil, nil,
		networkpolicy.Config{NodeName: node, QueueID: queue},
	)
	if err != nil {
		return err
	}
	factory.Start(ctx.Done())
	return controller.Run(ctx)
}

// lay hands each new connection that this node forwards to the queue, and those of pods to the node itself. What the
// node begins, such as the kubelet's probes, is let through.
func lay(pods netip.Prefix) error {
	rules, err := nftables.New()
	if err != nil {
		return err
	}
	table := &nftables.Table{Name: "policies", Family: nftables.TableFamilyIPv4}
	rules.AddTable(table)
	for name, hook := range map[string]*nftables.ChainHook{
		"forward": nftables.ChainHookForward,
		"input":   nftables.ChainHookInput,
	} {
		chain := rules.AddChain(&nftables.Chain{
			Name:     name,
			Table:    table,
			Type:     nftables.ChainTypeFilter,
			Hooknum:  hook,
			Priority: nftables.ChainPriorityFilter,
		})
		rules.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: known()})
		var from []expr.Any
		if name == "input" {
			from = source(pods)
		}
		rules.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(from, queued())})
	}
	return rules.Flush()
}

// known accepts packets of connections that were let through before.
func known() []expr.Any {
	states := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: states, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// source matches packets from these addresses.
func source(addresses netip.Prefix) []expr.Any {
	first := addresses.Masked().Addr().AsSlice()
	mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-addresses.Bits()))
	return []expr.Any{
		&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4, DestRegister: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: first},
	}
}

// queued is xtables' target NFQUEUE, revision 3: number of the queue, how many queues, flags; padded to 8 bytes.
func queued() expr.Any {
	var info xt.Unknown
	for _, field := range []uint16{queue, 1, 0, 0} {
		info = binary.NativeEndian.AppendUint16(info, field)
	}
	return &expr.Target{Name: "NFQUEUE", Rev: 3, Info: &info}
}
